package node

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// linkMessage is RTM_NEWLINK with a name.
func linkMessage(index int, name string) []byte {
	message := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(message[4:], uint32(index))
	return append(message, nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)).Serialize()...)
}

func TestInterruptedDumps(t *testing.T) {
	for _, test := range []struct {
		name        string
		interrupted int
		want        []string
		torn        []string
	}{
		{"once: the dump is repeated", 1, []string{"a", "b"}, nil},
		{"again and again: the last list counts", 1000, []string{"a"}, []string{"links"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			attempts := 0
			s, err := snapshot(func(request, _ uint16, _ []byte) ([][]byte, error) {
				if request != unix.RTM_GETLINK {
					return nil, nil
				}
				if attempts++; attempts <= test.interrupted {
					return [][]byte{linkMessage(1, "a")}, nl.ErrDumpInterrupted
				}
				return [][]byte{linkMessage(1, "a"), linkMessage(2, "b")}, nil
			}, true)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, link := range s.Links {
				got = append(got, link.Name)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("links (-want +got):\n%s", diff)
			}
			if !slices.Equal(s.Torn, test.torn) || !slices.Equal(Classify(s, Known{}).Torn, test.torn) {
				t.Errorf("torn: %v, want %v", s.Torn, test.torn)
			}
			if err := s.Complete(); (err == nil) != (test.torn == nil) {
				t.Errorf("complete: %v", err)
			}
		})
	}
}

// TestFailedDumps: a dump that fails leaves nothing that looks like a network without links.
func TestFailedDumps(t *testing.T) {
	for _, fails := range []uint16{unix.RTM_GETLINK, unix.RTM_GETADDR, unix.RTM_GETROUTE} {
		for _, failure := range []error{unix.ENOBUFS, unix.EPERM, nil} {
			s, err := snapshot(func(request, _ uint16, _ []byte) ([][]byte, error) {
				if request != fails {
					return nil, nil
				}
				if failure == nil {
					return [][]byte{{1, 2, 3}}, nil // shorter than its header
				}
				return nil, failure
			}, failure != nil)
			want := failure
			if want == nil {
				want = unix.EBADMSG
			}
			if !errors.Is(err, want) || s.Links != nil {
				t.Errorf("message %d fails with %v: snapshot %+v, error %v", fails, want, s, err)
			}
		}
	}
}

// FuzzMessages: attributes are the kernel's, but a parser must not panic.
func FuzzMessages(f *testing.F) {
	f.Add(linkMessage(1, "a"))
	f.Fuzz(func(_ *testing.T, message []byte) {
		if len(message) < unix.SizeofIfInfomsg {
			return
		}
		parseLink(message)
		parseAddress(message)
		parseRoute(message)
		nextHops{}.parse(message)
	})
}

package runtimedir_test

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

const generous = 5 * time.Minute // 200 writers at once on a busy machine have taken more than 30 s

// options compare addresses by value.
func options() cmp.Option { return cmpopts.EquateComparable(netip.Addr{}) }

func attachment(containerID string) runtimedir.Attachment {
	return runtimedir.Attachment{
		ContainerID: containerID,
		IfName:      "eth0",
		Network:     "pods",
		IPs:         []netip.Addr{netip.MustParseAddr("10.244.1.7")},
		AddedAt:     time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
	}
}

func readState(dir string) ([]runtimedir.Attachment, error) {
	file, err := runtimedir.New(dir).ReadState()
	return file.Attachments, err
}

// update removes first and then adds.
func update(t *testing.T, dir string, gone []runtimedir.Key, add ...runtimedir.Attachment) {
	t.Helper()
	warning, err := runtimedir.New(dir).Update(generous, gone, add...)
	if warning != nil || err != nil {
		t.Fatalf("Update: warning %v, error %v", warning, err)
	}
}

func read(t *testing.T, dir string) []runtimedir.Attachment {
	t.Helper()
	attachments, err := readState(dir)
	if err != nil {
		t.Fatal(err)
	}
	return attachments
}

func put(t testing.TB, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// names are the files below dir.
func names(t *testing.T, dir string) (names []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			name, _ := filepath.Rel(dir, path)
			names = append(names, name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestFileIsForPeople(t *testing.T) {
	dir := t.TempDir()
	full := attachment("c1")
	full.Namespace, full.Name, full.UID = "kube-system", "apm-x", "u1"
	full.Labels = map[string]string{"app": "apm-server"}
	full.IPs = append(full.IPs, netip.MustParseAddr("fd00::7"))
	full.HostInterface, full.Netns = "veth1", "/run/netns/1"
	unlabelled := attachment("c2")
	unlabelled.Labels = map[string]string{}
	put(t, filepath.Join(dir, "plugin/state.json"), `{"version": 1, "since": "2026-01-02T03:04:05Z"}`)
	update(t, dir, nil, full, unlabelled, attachment("c3"))

	got, err := os.ReadFile(filepath.Join(dir, "plugin/state.json"))
	if err != nil {
		t.Fatal(err)
	}
	want := `{"version":1,"since":"2026-01-02T03:04:05Z","attachments":[
{"containerID":"c1","ifName":"eth0","network":"pods","namespace":"kube-system","name":"apm-x","uid":"u1","labels":{"app":"apm-server"},"ips":["10.244.1.7","fd00::7"],"hostInterface":"veth1","netns":"/run/netns/1","addedAt":"2026-01-02T03:04:05.000000006Z"},
{"containerID":"c2","ifName":"eth0","network":"pods","labels":{},"ips":["10.244.1.7"],"addedAt":"2026-01-02T03:04:05.000000006Z"},
{"containerID":"c3","ifName":"eth0","network":"pods","ips":["10.244.1.7"],"addedAt":"2026-01-02T03:04:05.000000006Z"}
],"crc32":"SUM"}
`
	above, _, _ := strings.Cut(want, "],\"crc32")
	want = strings.Replace(want, "SUM", fmt.Sprintf("%08x", crc32.ChecksumIEEE([]byte(above))), 1)
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("state.json (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]runtimedir.Attachment{full, unlabelled, attachment("c3")}, read(t, dir), options()); diff != "" {
		t.Errorf("Read (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"plugin/state.json", "plugin/state.lock"}, names(t, dir)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
}

func TestRead(t *testing.T) {
	const valid = `{"containerID": "c1", "ifName": "eth0", "network": "pods", "ips": ["10.244.1.7"], "addedAt": "2026-01-02T03:04:05Z"}`
	tests := []struct {
		name    string
		content string
		want    string // "" is: it can be read
	}{
		{"valid", `{"version": 1, "attachments": [` + valid + `]}`, ""},
		{"a field of a later build of this version", `{"version": 1, "until": 5, "attachments": [` + valid + `]}`, ""},
		{"newer, of another shape", `{"version": 2, "attachments": {"c1": {}}}`, "newer"},
		{"empty after a power loss", ``, "corrupt"},
		{"cut off", `{"version": 1, "attachments": [` + valid, "corrupt"},
		{"no version", `{"attachments": []}`, "corrupt"},
		{"version zero", `{"version": 0}`, "corrupt"},
		{"not an object", `[1]`, "corrupt"},
		{"no time", `{"version": 1, "since": 5, "attachments": []}`, "corrupt"},
		{"newer, with its version at the end", `{"attachments": [{"ips": ["new"]}], "version": 2}`, "newer"},
		{"no list", `{"version": 1, "attachments": 7}`, "corrupt"},
		{"garbage behind it", `{"version": 1} x`, "corrupt"},
		{"no container", `{"version": 1, "attachments": [` + strings.Replace(valid, "c1", "", 1) + `]}`, "corrupt"},
		{"no interface", `{"version": 1, "attachments": [` + strings.Replace(valid, "eth0", "", 1) + `]}`, "corrupt"},
		{"empty address", `{"version": 1, "attachments": [` + strings.Replace(valid, "10.244.1.7", "", 1) + `]}`, "corrupt"},
		{"no address", `{"version": 1, "attachments": [` + strings.Replace(valid, "10.244.1.7", "10.244.1", 1) + `]}`, "corrupt"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "plugin/state.json")
			put(t, path, test.content)
			attachments, err := readState(dir)
			var newer *runtimedir.NewerVersionError
			var corrupt *runtimedir.CorruptError
			got := ""
			switch {
			case errors.As(err, &newer):
				got = "newer"
			case errors.As(err, &corrupt):
				got = "corrupt"
			case err != nil:
				got = err.Error()
			case len(attachments) != 1 || attachments[0].ContainerID != "c1":
				got = "other content"
			}
			if got != test.want {
				t.Errorf("Read is %q (%v), want %q", got, err, test.want)
			}
			if err != nil && !strings.Contains(err.Error(), path) {
				t.Errorf("%q does not name %s", err, path)
			}
			if diff := cmp.Diff([]string{"plugin/state.json"}, names(t, dir)); diff != "" {
				t.Errorf("a reader changes nothing (-want +got):\n%s", diff)
			}
		})
	}
	t.Run("missing", func(t *testing.T) {
		if _, err := readState(t.TempDir()); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Read is %v, want fs.ErrNotExist", err)
		}
	})
}

func FuzzState(f *testing.F) {
	f.Add([]byte(`{"version":1,"attachments":[]}`))
	f.Add([]byte(`{"version":1,"attachments":[{"containerID":"c","ifName":"eth0","network":"n","labels":{},"ips":["fe80::1%eth0"],"addedAt":"2026-01-02T03:04:05+01:30"}]}`))
	f.Add([]byte(`{"version":1,"attachments":[{"containerID":"\ud800","ifName":"<","labels":null,"ips":null}]}`))
	f.Add([]byte(`{"version":9}`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(dir, "plugin/state.json")
		put(t, path, string(data))
		attachments, err := readState(dir)
		if err != nil {
			var newer *runtimedir.NewerVersionError
			var corrupt *runtimedir.CorruptError
			if !errors.As(err, &newer) && !errors.As(err, &corrupt) {
				t.Fatalf("Read: %v", err)
			}
			return
		}
		// What can be read can be written and is read back the same, now that writers take it line by line.
		for i := range attachments {
			if ok, err := runtimedir.New(dir).Recorded(attachments[i].Key()); !ok || err != nil {
				t.Errorf("%q is not recorded: %v", attachments[i].Key(), err)
			}
		}
		update(t, dir, nil, attachment("c1"))
		want := slices.Concat(attachments, []runtimedir.Attachment{attachment("c1")})
		if diff := cmp.Diff(want, read(t, dir), options()); diff != "" {
			t.Errorf("read back (-want +got):\n%s", diff)
		}
		gone := want[len(data)%len(want)].Key()
		update(t, dir, []runtimedir.Key{gone})
		want = slices.DeleteFunc(want, func(a runtimedir.Attachment) bool { return a.Key() == gone })
		if diff := cmp.Diff(want, read(t, dir), options(), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("without %q (-want +got):\n%s", gone, diff)
		}
		if ok, err := runtimedir.New(dir).Recorded(gone); ok || err != nil {
			t.Errorf("%q is recorded: %v", gone, err)
		}
	})
}

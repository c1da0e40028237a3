package dataplane

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

func TestRead(t *testing.T) {
	// A file of Cilium 1.20.2, and what those before it call differently.
	const now = `{"UnsafeDaemonConfigOption": {"EnableHostLegacyRouting": true, "AllowLocalhost": "auto"}, "RoutingMode": "native",
		"EnableIPv4": true, "EnableIPv6": false, "EnableEndpointRoutes": true, "EnableBPFMasquerade": false, "EnableIPv4Masquerade": true, "EnableIPv6Masquerade": false}`
	before := strings.Replace(now, `"UnsafeDaemonConfigOption": {"EnableHostLegacyRouting": true, "AllowLocalhost": "auto"}`, `"EnableHostLegacyRouting": true`, 1)
	want := Settings{IPv4: true, LegacyHostRouting: true, EndpointRoutes: true, IPv4Masquerade: true}
	for _, test := range []struct {
		name, text string
		want       Settings
		err        string
	}{
		{"now", now, want, ""},
		{"before", before, want, ""},
		{"the other way round", strings.NewReplacer("true", "false", "false", "true").Replace(now), Settings{IPv6: true, BPFMasquerade: true, IPv6Masquerade: true}, ""},
		{"half of it is written", now[:len(now)/2], Settings{}, "unexpected EOF"},
		{"nothing is written yet", "", Settings{}, "EOF"},
		{"another version", strings.Replace(now, "EnableEndpointRoutes", "EndpointRoutes", 1), Settings{}, "EnableEndpointRoutes is missing"},
		{"a version without legacy routing", strings.Replace(now, "EnableHostLegacyRouting", "HostRouting", 1), Settings{}, "EnableHostLegacyRouting is missing"},
		{"another type", strings.Replace(now, `"EnableEndpointRoutes": true`, `"EnableEndpointRoutes": "yes"`, 1), Settings{}, "cannot unmarshal"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, File), []byte(test.text), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := Read(dir)
			if test.err == "" && (err != nil || got != test.want) {
				t.Errorf("got %+v, %v; want %+v", got, err, test.want)
			}
			if test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err) || !strings.Contains(err.Error(), File)) {
				t.Errorf("error %v, want %q and the file's name", err, test.err)
			}
		})
	}
	if _, err := Read(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a directory: %v", err)
	}
}

// TestChoose has the settings by the names that they have in docs/cilium.md.
func TestChoose(t *testing.T) {
	a := Settings{IPv4: true, IPv6: true, LegacyHostRouting: true, IPv4Masquerade: true, IPv6Masquerade: true}
	bl := a
	bl.BPFMasquerade = true
	b := Settings{IPv4: true, IPv6: true, BPFMasquerade: true, IPv4Masquerade: true, IPv6Masquerade: true}
	with := func(s Settings) *Settings { s.EndpointRoutes = true; return &s }
	none, backstop, masquerade := plan.Detour{}, plan.Detour{Backstop: true}, plan.Detour{Backstop: true, Masquerade4: true, Masquerade6: true}
	both := masquerade
	both.LocalRoutes = true
	unreadable := &fs.PathError{Op: "open", Path: File, Err: fs.ErrNotExist}
	for _, test := range []struct {
		name  string
		mode  Mode
		known Known
		plane Mode
		want  plan.Detour
		price bool
		// broken and unknown reports whether these are set.
		broken, unknown bool
	}{
		{"no Cilium", Auto, Known{}, Netfilter, backstop, false, false, false},
		{"what Cilium has left behind", Auto, Known{Settings: &b}, Netfilter, backstop, false, false, false},
		{"no Cilium and netfilter", Netfilter, Known{}, Netfilter, none, false, false, false},
		{"a", Auto, Known{Link: true, Settings: &a}, Cilium, backstop, true, false, false},
		{"ae", Auto, Known{Link: true, Settings: with(a)}, Cilium, backstop, false, false, false},
		{"b", Auto, Known{Link: true, Settings: &b}, Cilium, both, true, false, false},
		{"be", Auto, Known{Link: true, Settings: with(b)}, Cilium, both, true, false, false},
		{"bl", Auto, Known{Link: true, Settings: &bl}, Cilium, masquerade, true, false, false},
		{"ble", Auto, Known{Link: true, Settings: with(bl)}, Cilium, backstop, false, false, false},
		{"a without any masquerade", Auto, Known{Link: true, Settings: &Settings{IPv4: true, IPv6: true, LegacyHostRouting: true}}, Cilium, masquerade, true, false, false},
		{"a with masquerade of IPv4 alone", Auto, Known{Link: true, Settings: &Settings{IPv4: true, IPv6: true, LegacyHostRouting: true, IPv4Masquerade: true}}, Cilium, plan.Detour{Backstop: true, Masquerade6: true}, true, false, false},
		{"a without IPv6", Auto, Known{Link: true, Settings: &Settings{IPv4: true, LegacyHostRouting: true, IPv4Masquerade: true}}, Cilium, backstop, true, false, false},
		{"bl without IPv6", Auto, Known{Link: true, Settings: &Settings{IPv4: true, LegacyHostRouting: true, BPFMasquerade: true}}, Cilium, plan.Detour{Backstop: true, Masquerade4: true}, true, false, false},
		{"unreadable", Auto, Known{Link: true, Unreadable: unreadable}, Netfilter, backstop, false, false, true},
		{"b and netfilter", Netfilter, Known{Link: true, Settings: &b}, Netfilter, none, false, true, false},
		{"bl and netfilter", Netfilter, Known{Link: true, Settings: &bl}, Netfilter, none, false, true, false},
		{"a and netfilter", Netfilter, Known{Link: true, Settings: &a}, Netfilter, none, true, false, false},
		{"unreadable and netfilter", Netfilter, Known{Link: true, Unreadable: unreadable}, Netfilter, none, false, false, false},
		{"unreadable and cilium", Cilium, Known{Unreadable: unreadable}, Cilium, both, true, false, false},
		{"ble and cilium", Cilium, Known{Settings: with(bl)}, Cilium, backstop, false, false, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := Choose(test.mode, test.known)
			if got.Plane != test.plane || got.Detour != test.want {
				t.Errorf("%s with %+v, want %s with %+v", got.Plane, got.Detour, test.plane, test.want)
			}
			if got.Reason == "" || (got.Price != "") != test.price || (got.Instead != "") != test.price || (got.Broken != "") != test.broken || (got.Unknown != "") != test.unknown {
				t.Errorf("%+v: want a price %t, broken %t, unknown %t", got, test.price, test.broken, test.unknown)
			}
		})
	}
}

// TestReadNoFile: what only looks like the file does not keep the reader waiting.
func TestReadNoFile(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mkfifo(filepath.Join(dir, File), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(dir); err == nil || !strings.Contains(err.Error(), "is no regular file") {
		t.Errorf("a FIFO: %v", err)
	}
}

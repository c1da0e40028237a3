package runtimedir_test

import (
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// text is the state file of dir.
func text(t *testing.T, dir string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, "plugin/state.json"))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// sealed is the file that begins with above, as a writer leaves it.
func sealed(above string) string {
	return above + fmt.Sprintf("],\"crc32\":\"%08x\"}\n", crc32.ChecksumIEEE([]byte(above)))
}

// What a later build of this version adds outlives the writers of this one.
func TestUpdateKeepsWhatItDoesNotKnow(t *testing.T) {
	dir := t.TempDir()
	const later = `{"version":1,"node":"n1","attachments":[` + "\n" +
		`{"containerID":"c1","ifName":"eth0","network":"pods","ips":["10.244.1.7"],"addedAt":"2026-01-02T03:04:05Z","mtu":1450}`
	put(t, filepath.Join(dir, "plugin/state.json"), sealed(later+"\n"))
	update(t, dir, nil, attachment("c2"))
	if got := text(t, dir); !strings.HasPrefix(got, later+",\n{\"containerID\":\"c2\"") {
		t.Errorf("with another record:\n%s", got)
	}
	update(t, dir, []runtimedir.Key{attachment("c2").Key()})
	if diff := cmp.Diff(sealed(later+"\n"), text(t, dir)); diff != "" {
		t.Errorf("without it again (-want +got):\n%s", diff)
	}
}

// Whatever a record of somebody else turns into, the next writer notices, though it decodes none.
func TestUpdateNoticesDamage(t *testing.T) {
	whole := t.TempDir()
	update(t, whole, nil, attachment("c1"), attachment("c2"))
	good := text(t, whole)
	for name, damage := range map[string]func(string) string{
		"a record without an address": func(s string) string { return strings.Replace(s, "10.244.1.7", "", 1) },
		"a record of another type":    func(s string) string { return strings.Replace(s, `["10.244.1.7"]`, "7", 1) },
		"zeros":                       func(s string) string { return s[:100] + strings.Repeat("\x00", 50) + s[150:] },
		"cut off":                     func(s string) string { return s[:len(s)-30] },
		"a line is missing":           func(s string) string { return strings.Replace(s, ",\n", "\n,,", 1) },
		"one bit":                     func(s string) string { return strings.Replace(s, `"ips":[`, `"ips";[`, 1) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			put(t, filepath.Join(dir, "plugin/state.json"), damage(good))
			var corrupt *runtimedir.CorruptError
			if _, err := runtimedir.New(dir).Recorded(attachment("c1").Key()); !errors.As(err, &corrupt) {
				t.Errorf("Recorded is %v, want a CorruptError", err)
			}
			warning, err := runtimedir.New(dir).Update(generous, nil, attachment("c3"))
			if !errors.As(warning, &corrupt) || err != nil {
				t.Errorf("Update: warning %v, error %v, want a CorruptError as the warning", warning, err)
			}
			if kept, err := os.ReadFile(filepath.Join(dir, "plugin/state.json.corrupt")); err != nil || string(kept) != damage(good) {
				t.Errorf("kept is %q (%v)", kept, err)
			}
			if diff := cmp.Diff([]runtimedir.Attachment{attachment("c3")}, read(t, dir), options()); diff != "" {
				t.Errorf("records (-want +got):\n%s", diff)
			}
		})
	}
}

// Files of people and of other builds of this version: only the sum or the layout is another.
func TestUpdateOfAnEditedFile(t *testing.T) {
	dir := t.TempDir()
	update(t, dir, nil, attachment("c1"), attachment("c2"))
	for name, edit := range map[string]func(string) string{
		"an address":   func(s string) string { return strings.Replace(s, "10.244.1.7", "10.244.1.8", 1) },
		"no sum":       func(s string) string { return s[:strings.LastIndex(s, `,"crc32"`)] + "}" },
		"line breaks":  func(s string) string { return strings.ReplaceAll(s, ",", ",\r\n  ") },
		"another name": func(s string) string { return strings.Replace(s, `"c1"`, `"\u0063\u0031"`, 1) },
	} {
		t.Run(name, func(t *testing.T) {
			edited := t.TempDir()
			put(t, filepath.Join(edited, "plugin/state.json"), edit(text(t, dir)))
			want := read(t, edited)
			for id, recorded := range map[string]bool{"c1": true, "c2": true, "c3": false} {
				if got, err := runtimedir.New(edited).Recorded(attachment(id).Key()); got != recorded || err != nil {
					t.Errorf("Recorded(%s) is %v (%v), want %v", id, got, err, recorded)
				}
			}
			update(t, edited, []runtimedir.Key{attachment("c1").Key()}, attachment("c3"))
			if diff := cmp.Diff(append(want[1:], attachment("c3")), read(t, edited), options()); diff != "" {
				t.Errorf("records (-want +got):\n%s", diff)
			}
		})
	}
}

func TestRecorded(t *testing.T) {
	dir := t.TempDir()
	other := attachment("c1")
	other.IfName, other.Name = "net<1>", "c3"
	update(t, dir, nil, attachment("c1"), other, attachment("c10"))
	for key, want := range map[runtimedir.Key]bool{
		attachment("c1").Key():                 true,
		attachment("c10").Key():                true,
		other.Key():                            true,
		{ContainerID: "c10", IfName: "net<1>"}: false,
		{ContainerID: "c1", IfName: "eth"}:     false,
		{ContainerID: "c", IfName: "eth0"}:     false,
		{ContainerID: "c3", IfName: "eth0"}:    false, // stands in the file
		{ContainerID: "1", IfName: "eth0"}:     false,
	} {
		if got, err := runtimedir.New(dir).Recorded(key); got != want || err != nil {
			t.Errorf("Recorded(%v) is %v (%v), want %v", key, got, err, want)
		}
	}
}

// Since tells a list that goes on from one that began anew.
func TestSince(t *testing.T) {
	dir := t.TempDir()
	since := func() time.Time {
		t.Helper()
		file, err := runtimedir.New(dir).ReadState()
		if err != nil {
			t.Fatal(err)
		}
		return file.Since
	}
	begun := time.Now()
	update(t, dir, nil, attachment("c1"))
	first := since()
	if first.Before(begun) || first.After(time.Now()) {
		t.Errorf("since %s, want now", first)
	}
	update(t, dir, []runtimedir.Key{attachment("c1").Key()})
	update(t, dir, nil, attachment("c2"))
	if got := since(); !got.Equal(first) {
		t.Errorf("since %s, want %s: it is the same list", got, first)
	}

	// A corrupt file that a DEL finds begins anew too, without a record. Where that cannot be written, the
	// corrupt file stays for the next to find.
	put(t, filepath.Join(dir, "plugin/state.json"), "{")
	temp := filepath.Join(dir, "plugin/state.json.tmp")
	put(t, filepath.Join(temp, "full"), "") // which makes it a directory
	if warning, err := runtimedir.New(dir).Update(generous, nil, attachment("c3")); warning == nil || err == nil {
		t.Errorf("Update: warning %v, error %v, want both", warning, err)
	}
	if got := text(t, dir); got != "{" {
		t.Errorf("the file is %q, want the corrupt one", got)
	}
	if err := os.RemoveAll(temp); err != nil {
		t.Fatal(err)
	}
	if warning, err := runtimedir.New(dir).Update(generous, []runtimedir.Key{attachment("c2").Key()}); warning == nil || err != nil {
		t.Errorf("Update: warning %v, error %v, want a warning", warning, err)
	}
	if got := since(); !got.After(first) {
		t.Errorf("since %s, want later than %s: it is another list", got, first)
	}

	// Files from before there was such a time go on without.
	put(t, filepath.Join(dir, "plugin/state.json"), `{"version": 1, "attachments": []}`)
	update(t, dir, nil, attachment("c4"))
	if got := since(); !got.IsZero() {
		t.Errorf("since %s, want none", got)
	}
}

package conflist

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestReplaceOnlyWhatWasRead: a primary CNI that writes its file between our reading and our writing keeps what it wrote.
func TestReplaceOnlyWhatWasRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "10-a.conflist")
	like := file{mode: 0o640, uid: os.Geteuid(), gid: os.Getegid()}
	if err := os.WriteFile(path, []byte("new"), 0o644); err != nil {
		t.Fatal(err)
	}
	want := func(content string) {
		t.Helper()
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 1 {
			t.Errorf("%v, %v", entries, err)
		}
		if data, err := os.ReadFile(path); err != nil || string(data) != content {
			t.Errorf("%q, %v, want %q", data, err, content)
		}
	}
	for what, err := range map[string]error{
		"replace": replace(path, []byte("old"), []byte("ours"), like), "remove": removeOnly(path, []byte("old")), "create": create(path, []byte("ours"), like),
	} {
		if !errors.Is(err, ErrChanged) {
			t.Errorf("%s: %v", what, err)
		}
	}
	want("new")
	if err := replace(filepath.Join(dir, "20-gone.conflist"), []byte("old"), []byte("ours"), like); err == nil {
		t.Error("a file that is gone is made anew")
	}
	want("new")
	if err := replace(path, []byte("new"), []byte("ours"), like); err != nil {
		t.Error(err)
	}
	want("ours")
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o640 {
		t.Errorf("mode %v: %v", info.Mode(), err)
	}
}

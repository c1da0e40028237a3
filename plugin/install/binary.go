package install

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// binary is the plugin that this installer brings, and where it goes.
type binary struct {
	source  string
	dir     string
	version string
	// placed is how the file looked when it was last found to be right: nothing is read while it looks the same.
	placed identity
	speaks []string // versions of CNI
}

// identity changes with every change of a file.
type identity struct {
	inode    uint64
	size     int64
	mode     uint32
	modified unix.Timespec
	changed  unix.Timespec
}

func identify(path string) (identity, error) {
	var stat unix.Stat_t
	if err := unix.Lstat(path, &stat); err != nil {
		return identity{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return identity{stat.Ino, stat.Size, stat.Mode, stat.Mtim, stat.Ctim}, nil
}

func (b *binary) path() string { return filepath.Join(b.dir, PluginType) }

// digest is the SHA-256 of the plugin that this installer brings.
func (b *binary) digest() (string, error) {
	data, err := os.ReadFile(b.source)
	return hexDigest(data), err
}

func hexDigest(data []byte) string { return fmt.Sprintf("%x", sha256.Sum256(data)) }

// ensure puts the plugin in place where it is missing, damaged or another one, and says whether it did.
//
// Releases of several versions share one file. It is the newest of those whose installers run; where versions
// cannot be compared, or are the same, the first one's stands. So two installers never take turns in replacing each other's, and a
// release that is rolled back alone brings its older plugin, which its agent understands.
func (b *binary) ensure(ctx context.Context, others func() ([]*Record, error)) (replaced bool, err error) {
	if id, err := identify(b.path()); err == nil && id == b.placed {
		return false, nil
	}
	unlock, err := lock(ctx, b.dir)
	if err != nil {
		return false, fmt.Errorf("directory of the CNI plugins (--cni-bin-dir): %w", err)
	}
	defer unlock()
	if err := (directory{path: b.dir}).removeTemps(); err != nil {
		return false, b.explain(err)
	}
	ours, err := os.ReadFile(b.source)
	if err != nil {
		return false, fmt.Errorf("plugin to install (--plugin): %w", err)
	}
	there, err := os.ReadFile(b.path())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	keep := err == nil && bytes.Equal(there, ours)
	if !keep && err == nil {
		running, err := others()
		keep = err != nil || preferred(hexDigest(there), b.version, running)
	}
	if keep {
		if info, err := os.Lstat(b.path()); err != nil || info.Mode() != 0o755 {
			keep = false
			ours = there
		} else if b.speaks, err = versions(ctx, b.path()); err != nil {
			return false, err
		}
	}
	if !keep {
		if err := b.write(ctx, ours); err != nil {
			return false, err
		}
	}
	b.placed, err = identify(b.path())
	return !keep, err
}

// preferred says whether the plugin with this digest, which is in place, is another installer's that stands against version.
func preferred(digest, version string, others []*Record) bool {
	for _, other := range others {
		if order, known := compareVersions(other.PluginVersion, version); other.PluginSHA256 == digest && (!known || order >= 0) {
			return true
		}
	}
	return false
}

// write makes data the plugin, once it is known to run here. A rename: the file that is replaced may be running
// (ETXTBSY).
func (b *binary) write(ctx context.Context, data []byte) error {
	d := directory{path: b.dir}
	temp, err := d.temp(PluginType, data, 0o755)
	if err != nil {
		return b.explain(err)
	}
	if b.speaks, err = versions(ctx, temp); err == nil {
		err = os.Rename(temp, b.path())
	}
	if err != nil {
		return errors.Join(b.explain(err), os.Remove(temp))
	}
	return syncDir(b.dir)
}

// explain adds what to do about a directory that cannot be written.
func (b *binary) explain(err error) error {
	if errors.Is(err, unix.EROFS) || errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: the directory of the CNI plugins cannot be written on this node; name the one that its runtime uses and that can, "+
			"with --cni-bin-dir (value cni.binDir of the chart)", err)
	}
	return err
}

// versions runs the plugin, and returns the versions of CNI that it speaks.
func versions(ctx context.Context, path string) ([]string, error) {
	out, err := call(ctx, path, "VERSION", []byte(`{"cniVersion": "1.0.0"}`))
	if err != nil {
		return nil, err
	}
	var answer struct{ SupportedVersions []string }
	if err := json.Unmarshal(out, &answer); err != nil || len(answer.SupportedVersions) == 0 {
		return nil, fmt.Errorf("%s does not answer as a CNI plugin: %q", path, out)
	}
	return answer.SupportedVersions, nil
}

// accepts asks the plugin in place whether it understands our entry of a file: one that it does not would fail every pod.
func (b *binary) accepts(ctx context.Context, file File) error {
	l, err := parseList(file.Data)
	if err != nil || len(l.ours) == 0 {
		return err
	}
	entry := l.plugins.items[l.ours[0]]
	conf := splice(l.data[entry.start:entry.end], 1, 1, []byte(`"cniVersion": "1.1.0", "name": "`+PluginType+`", `))
	if _, err := call(ctx, b.path(), "STATUS", conf); err != nil {
		return fmt.Errorf("the plugin would not take its entry in %s: %w", file.Name, err)
	}
	return nil
}

func call(ctx context.Context, path, command string, stdin []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for attempt := 0; ; attempt++ {
		cmd := exec.CommandContext(ctx, path)
		cmd.Env = []string{"CNI_COMMAND=" + command, "CNI_PATH=" + filepath.Dir(path)}
		cmd.Stdin = bytes.NewReader(stdin)
		out, err := cmd.Output()
		// A child that another goroutine has forked may hold the file open for writing until its own exec.
		if errors.Is(err, unix.ETXTBSY) && attempt < 20 {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%s cannot be run here: %w: %s", path, err, bytes.TrimSpace(out))
		}
		return out, nil
	}
}

// compareVersions compares two of the form v1.2.3, and what git describe puts behind: v1.2.3-4-g0123abc is four commits
// later. Others cannot be compared.
func compareVersions(a, b string) (order int, known bool) {
	x, okA := parseVersion(a)
	y, okB := parseVersion(b)
	if !okA || !okB {
		return 0, false
	}
	for i := range x {
		if x[i] != y[i] {
			return x[i] - y[i], true
		}
	}
	return 0, true
}

func parseVersion(text string) (numbers [4]int, ok bool) {
	text, ok = strings.CutPrefix(text, "v")
	core, rest, described := strings.Cut(text, "-")
	parts := strings.Split(core, ".")
	if !ok || len(parts) != 3 {
		return numbers, false
	}
	if described {
		commits, hash, ok := strings.Cut(rest, "-")
		if !ok || !strings.HasPrefix(hash, "g") {
			return numbers, false // a pre-release, or changes that no commit has
		}
		parts = append(parts, commits)
	}
	for i, part := range parts {
		n, err := strconv.Atoi(part)
		if err != nil {
			return numbers, false
		}
		numbers[i] = n
	}
	return numbers, true
}

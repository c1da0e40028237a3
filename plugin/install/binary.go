package install

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/semver"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/plugin/conflist"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// binary is the plugin that this installer brings, and where it goes.
type binary struct {
	source  string
	dir     string
	version string
	// placed identifies the file that was last verified: while it is unchanged, nothing is read.
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

func (b *binary) path() string { return filepath.Join(b.dir, entry.Type) }

// digest is the SHA-256 of the plugin that this installer brings.
func (b *binary) digest() (string, error) {
	data, err := os.ReadFile(b.source)
	return hexDigest(data), err
}

func hexDigest(data []byte) string { return fmt.Sprintf("%x", sha256.Sum256(data)) }

// ensure puts the plugin in place where it is missing, damaged or of another build, and returns whether it did.
//
// Releases of several versions share one file: the newest of those whose installers run. Between versions that are equal or
// cannot be compared, the file in place is kept, so that two installers never replace it in turns. A release that is rolled back alone
// brings its older plugin, which its agent understands.
func (b *binary) ensure(ctx context.Context, others func() ([]*runtimedir.Record, error)) (replaced bool, err error) {
	if id, err := identify(b.path()); err == nil && id == b.placed {
		return false, nil
	}
	unlock, err := conflist.Lock(ctx, b.dir)
	if err != nil {
		return false, b.explain(fmt.Errorf("directory of the CNI plugins (--cni-bin-dir): %w", err))
	}
	defer unlock()
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
		err := conflist.WriteProgram(b.path(), ours, func(path string) (err error) {
			if b.speaks, err = versions(ctx, path); err != nil {
				err = fmt.Errorf("plugin to install (--plugin): %w", errors.New(strings.ReplaceAll(err.Error(), path, b.source))) // a name that lasts
			}
			return err
		})
		if err != nil {
			return false, b.explain(err)
		}
	}
	b.placed, err = identify(b.path())
	return !keep, err
}

// preferred reports whether the plugin with this digest, which is in place, is that of another installer and not older than version.
func preferred(digest, version string, others []*runtimedir.Record) bool {
	for _, other := range others {
		if order, known := compareVersions(other.PluginVersion, version); other.PluginSHA256 == digest && (!known || order >= 0) {
			return true
		}
	}
	return false
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

// accepts asks the plugin in place whether it understands an entry: one that it does not would fail every pod.
func (b *binary) accepts(ctx context.Context, entry []byte) error {
	conf := slices.Concat([]byte(`{"cniVersion": "1.1.0", "name": "magic-ip-address", `), bytes.TrimPrefix(entry, []byte("{")))
	if _, err := call(ctx, b.path(), "STATUS", conf); err != nil {
		return fmt.Errorf("the plugin would not take its entry: %w", err)
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
// later, where semantic versioning takes that for a pre-release. Others cannot be compared.
func compareVersions(a, b string) (order int, known bool) {
	x, commitsX := described(a)
	y, commitsY := described(b)
	if strings.HasSuffix(a, "-dirty") || strings.HasSuffix(b, "-dirty") || !semver.IsValid(x) || !semver.IsValid(y) || semver.Canonical(x) != x || semver.Canonical(y) != y {
		return 0, false
	}
	return cmp.Or(semver.Compare(x, y), cmp.Compare(commitsX, commitsY)), true
}

// described cuts what git describe puts behind a version: the commits since then, and the last of them.
func described(version string) (tag string, commits int) {
	if cut, hash, ok := lastCut(version); ok && strings.HasPrefix(hash, "g") {
		if tag, count, ok := lastCut(cut); ok {
			if commits, err := strconv.Atoi(count); err == nil {
				return tag, commits
			}
		}
	}
	return version, 0
}

func lastCut(text string) (before, after string, ok bool) {
	i := strings.LastIndexByte(text, '-')
	if i < 0 {
		return text, "", false
	}
	return text[:i], text[i+1:], true
}

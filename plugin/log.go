package plugin

import (
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/magic-ip-address/magic-ip-address/plugin/state"
)

// logLimit is the size in bytes at which plugin.log becomes plugin.log.1, in place of the last one.
const logLimit = 256 << 10

// logger logs one command to plugin.log in the runtime directory dir, one line each, warnings and errors only.
func (p Plugin) logger(dir, command string) *slog.Logger {
	file := logFile{path: filepath.Join(dir, state.LogName), stderr: p.Stderr}
	return slog.New(slog.NewTextHandler(file, &slog.HandlerOptions{Level: slog.LevelWarn})).With("command", command)
}

// logFile is opened for each line: most processes log nothing. It never creates its directory.
type logFile struct {
	path   string
	stderr io.Writer
}

// Write implements io.Writer for one line.
func (f logFile) Write(line []byte) (int, error) {
	if f.append(line) != nil {
		return f.stderr.Write(line)
	}
	return len(line), nil
}

func (f logFile) append(line []byte) error {
	// Of two processes that find it full at once, the second may move a fresh file over the full one: old lines are
	// lost then, and the bound holds.
	if info, err := os.Stat(f.path); err == nil && info.Size() >= logLimit {
		if err := os.Rename(f.path, f.path+state.OldLog); err != nil {
			return err
		}
	}
	file, err := os.OpenFile(f.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	_, err = file.Write(line)
	return errors.Join(err, file.Close())
}

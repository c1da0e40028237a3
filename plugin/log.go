package plugin

import (
	"io"
	"log/slog"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// logger logs one command to the plugin's log in the runtime directory, one line each, warnings and errors only.
func (p Plugin) logger(dir runtimedir.Dir, command string) *slog.Logger {
	return newLogger(logFile{dir: dir, stderr: p.Stderr}, command)
}

func newLogger(w io.Writer, command string) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelWarn})).With("command", command)
}

// logFile is opened for each line: most processes log nothing.
type logFile struct {
	dir    runtimedir.Dir
	stderr io.Writer
}

// Write implements io.Writer for one line.
func (f logFile) Write(line []byte) (int, error) {
	if f.dir.Log(line) != nil {
		return f.stderr.Write(line)
	}
	return len(line), nil
}

package runtimedir

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

const (
	logFile   = "plugin.log"
	oldLogExt = ".1" // behind the name of the log before
	// logLimit is the size in bytes at which plugin.log becomes plugin.log.1, in place of the last one.
	logLimit = 256 << 10
	// maxLog is what a log of that size can have become by one line more of each of many processes.
	maxLog = 4 * logLimit
)

// Log appends one line to the log of the plugin. It never creates the directory.
func (d Dir) Log(line []byte) error {
	f, err := d.open(pluginDir)
	if err != nil {
		return err
	}
	defer f.close()
	// Of two processes that find it full at once, the second may move a fresh file over the full one: old lines are
	// lost then, and the bound holds.
	stat, err := f.lookup(logFile)
	if err == nil && (stat.Size >= logLimit || unsafe(&stat, maxLog) != "") {
		if err := unix.Renameat(f.fd, logFile, f.fd, logFile+oldLogExt); err != nil {
			return &os.LinkError{Op: "rename", Old: f.join(logFile), New: f.join(logFile + oldLogExt), Err: err}
		}
	}
	file, _, err := f.create(logFile, unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT, 0o644, maxLog)
	if err != nil {
		return err
	}
	_, err = file.Write(line)
	return errors.Join(err, file.Close())
}

// LogPath is the log of the plugin, for messages.
func (d Dir) LogPath() string { return d.path + "/" + pluginDir + "/" + logFile }

// ReadLog returns the log of the plugin; fs.ErrNotExist where there is none.
func (d Dir) ReadLog() ([]byte, error) {
	for _, names := range [][]string{{pluginDir}, nil} {
		f, err := d.open(names...)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		data, err := f.read(logFile, maxLog)
		f.close()
		if !errors.Is(err, fs.ErrNotExist) {
			return data, err
		}
	}
	return nil, &fs.PathError{Op: "open", Path: d.LogPath(), Err: fs.ErrNotExist}
}

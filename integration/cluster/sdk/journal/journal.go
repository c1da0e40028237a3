// Package journal is where servers and applications write what they have received and sent: files of a directory of the
// node, which outlive their pods.
package journal

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Prefix begins the names of all items that applications send, which is how servers tell them from the SDKs' own.
const Prefix = "load."

// Journal is an open file to which lines are appended. Its methods may be called from several goroutines and processes.
type Journal struct{ file *os.File }

// Open opens the journal of that name in a directory.
func Open(directory, name string) (*Journal, error) {
	file, err := os.OpenFile(filepath.Join(directory, name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	return &Journal{file}, nil
}

// Received appends the names that applications have given; it leaves out all others.
func (j *Journal) Received(names ...string) error {
	var lines strings.Builder
	for _, name := range names {
		if strings.HasPrefix(name, Prefix) {
			lines.WriteString(name + "\n")
		}
	}
	if lines.Len() == 0 {
		return nil
	}
	_, err := j.file.WriteString(lines.String())
	return err
}

// Name is that of an item of an application.
func Name(application string, number int) string {
	return fmt.Sprintf("%s%s.%d", Prefix, application, number)
}

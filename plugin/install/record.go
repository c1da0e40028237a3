package install

import (
	"path/filepath"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// Record is what package runtimedir has, until its readers ask that.
type Record = runtimedir.Record

// ReadRecord likewise.
func ReadRecord(runtimeDir, name string) (*Record, error) {
	return runtimedir.New(runtimeDir).Installer(name).ReadRecord()
}

// RecordPath likewise.
func RecordPath(runtimeDir, name string) string {
	return filepath.Join(runtimeDir, "install", name, "record.json")
}

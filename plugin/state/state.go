// Package state is the state file as package runtimedir has it, until all its readers ask that.
package state

import (
	"time"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

type (
	Attachment        = runtimedir.Attachment
	Key               = runtimedir.Key
	File              = runtimedir.File
	NewerVersionError = runtimedir.NewerVersionError
	CorruptError      = runtimedir.CorruptError
)

func Path(dir string) string { return runtimedir.New(dir).StatePath() }

func ReadFile(dir string) (File, error) { return runtimedir.New(dir).ReadState() }

func Read(dir string) ([]Attachment, error) {
	file, err := ReadFile(dir)
	return file.Attachments, err
}

func Recorded(dir string, key Key) (bool, error) { return runtimedir.New(dir).Recorded(key) }

func Update(dir string, wait time.Duration, gone []Key, add ...Attachment) (warning, err error) {
	return runtimedir.New(dir).Update(wait, gone, add...)
}

func Remove(dir string, wait time.Duration) error { return runtimedir.New(dir).RemoveState(wait) }

package runtimedir

import (
	"bytes"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"slices"
)

// lines is the state file as writers leave it, one record a line:
//
//	{"version":1,"since":"2026-01-02T03:04:05Z","attachments":[
//	{"containerID":"c1","ifName":"eth0",…},
//	{"containerID":"c2","ifName":"eth0",…}
//	],"crc32":"cbf43926"}
//
// A plugin runs once for every pod, beside the records of all others. To decode, validate and encode them each
// time would cost more than all else that it does. The checksum (IEEE 802.3, hexadecimal) covers what is above it: where it
// matches, a writer has left exactly this, and it was valid then. Where it does not match, after a power loss or an
// edit by hand, the whole file is decoded and validated.
type lines struct {
	head    []byte
	records [][]byte // each begins with what start returns
}

// versionHead is how the files begin that this build may take line by line.
var versionHead = fmt.Appendf(nil, `{"version":%d,`, Version) //nolint:gochecknoglobals // a constant

// load reads the state file of f as its writers do. The errors are those of ReadState; data is what was read.
func load(f *folder) (data []byte, list lines, err error) {
	if data, err = f.read(stateFile, stateLimit); err != nil {
		return nil, lines{}, err
	}
	if intact(data) {
		return data, split(data), nil
	}
	file, err := parse(f.join(stateFile), data)
	if err != nil {
		return data, lines{}, err
	}
	list, err = encode(file)
	return data, list, err
}

// intact reports whether a writer of this version has left exactly this.
func intact(data []byte) bool {
	at := lastLine(data)
	return bytes.HasPrefix(data, versionHead) && bytes.Equal(data[at:], tail(data[:at]))
}

func lastLine(data []byte) int {
	return bytes.LastIndexByte(bytes.TrimSuffix(data, []byte("\n")), '\n') + 1
}

// split is for data that is intact.
func split(data []byte) lines {
	head, records, _ := bytes.Cut(data[:lastLine(data)], []byte("\n"))
	list := lines{head: head}
	if len(records) > 0 {
		// No record has a line break in it: JSON strings cannot.
		list.records = bytes.Split(bytes.TrimSuffix(records, []byte("\n")), []byte(",\n"))
	}
	return list
}

// tail is the last line of the file that begins with above.
func tail(above []byte) []byte {
	return fmt.Appendf(nil, "],\"crc32\":\"%08x\"}\n", crc32.ChecksumIEEE(above))
}

// join is the opposite of split.
func (l *lines) join() []byte {
	data := slices.Concat(l.head, []byte("\n"), bytes.Join(l.records, []byte(",\n")))
	if len(l.records) > 0 {
		data = append(data, '\n')
	}
	return append(data, tail(data)...)
}

func encode(file File) (list lines, err error) {
	records := file.Attachments
	file.Version, file.Attachments = Version, []Attachment{}
	head, err := json.Marshal(file)
	if err != nil {
		return lines{}, err
	}
	list.head = bytes.TrimSuffix(head, []byte("]}"))
	return list, list.add(records)
}

func (l *lines) add(attachments []Attachment) error {
	for _, attachment := range attachments {
		if err := attachment.validate(); err != nil {
			return err
		}
		record, err := json.Marshal(attachment)
		if err != nil {
			return err
		}
		l.records = append(l.records, record)
	}
	return nil
}

// start is how the line of a record begins: a record is found without decoding any.
func start(key Key) ([]byte, error) {
	data, err := json.Marshal(key)
	return append(bytes.TrimSuffix(data, []byte("}")), ','), err
}

// contains reports whether intact data has a record.
func contains(data []byte, key Key) (bool, error) {
	// Mostly not even the container is there. Its ID is written as it is: CNI allows no character in it that JSON
	// would escape (SPEC.md, "Parameters").
	if !bytes.Contains(data, []byte(key.ContainerID)) {
		return false, nil
	}
	start, err := start(key)
	return bytes.Contains(data, append([]byte("\n"), start...)), err
}

func (l *lines) remove(keys []Key) error {
	for _, key := range keys {
		start, err := start(key)
		if err != nil {
			return err
		}
		l.records = slices.DeleteFunc(l.records, func(record []byte) bool { return bytes.HasPrefix(record, start) })
	}
	return nil
}

// has reports whether a record that begins with start is there.
func (l *lines) has(start []byte) bool {
	return slices.ContainsFunc(l.records, func(record []byte) bool { return bytes.HasPrefix(record, start) })
}

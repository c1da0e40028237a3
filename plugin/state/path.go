package state

import "path/filepath"

// Path is the state file in a runtime dir.
func Path(dir string) string { return filepath.Join(dir, fileName) }

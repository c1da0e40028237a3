package runtimedir

import (
	"path/filepath"
	"strings"
)

// Folders are the directories in which files are replaced that an agent reads, as they are now: a directory that is added
// later shows as an event in one of them. None of them need be there.
func (d Dir) Folders() []string {
	folders := []string{d.path, filepath.Join(d.path, pluginDir), filepath.Join(d.path, agentsDir)}
	f, err := d.open(agentsDir)
	if err != nil {
		return folders
	}
	defer f.close()
	entries, _ := f.list()
	for _, entry := range entries {
		if entry.IsDir() {
			folders = append(folders, filepath.Join(d.path, agentsDir, entry.Name()))
		}
	}
	return folders
}

// IsState reports whether the path of an event is that of a state file: ReadState has news then.
func (d Dir) IsState(path string) bool {
	return path == d.StatePath() || path == filepath.Join(d.path, stateFile)
}

// IsClaims reports whether the path of an event is one of the claims of agents: Agents and ReadClaims have news then. A new
// directory of an agent is one too.
func (d Dir) IsClaims(path string) bool {
	below, ok := strings.CutPrefix(path, filepath.Join(d.path, agentsDir)+"/")
	return ok && (!strings.Contains(below, "/") && filepath.Ext(below) != tempExt || filepath.Base(below) == claimsFile)
}

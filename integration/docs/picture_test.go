package docs

import (
	"encoding/xml"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestPictures: each is well formed, says what it shows to those who cannot see it, and is shown.
func TestPictures(t *testing.T) {
	paths, err := filepath.Glob(root + "/docs/images/*")
	if err != nil || len(paths) < 4 {
		t.Fatalf("%d pictures: %v", len(paths), err)
	}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var picture struct {
			Title string `xml:"title"`
			Desc  string `xml:"desc"`
		}
		if err := xml.Unmarshal(data, &picture); err != nil || picture.Title == "" || picture.Desc == "" {
			t.Errorf("%s: title %q, description %q, %v", path, picture.Title, picture.Desc, err)
		}
		shown := false
		for _, d := range documents(t) {
			shown = shown || strings.Contains(d.text, "images/"+filepath.Base(path)+")")
		}
		if !shown {
			t.Errorf("no document shows %s", path)
		}
	}
}

package conflist

import (
	"errors"
	"strings"
	"testing"
)

// TestVersionsOfAList: which lists the plugin speaks every version of that a runtime may choose, in whatever order it names its own, and
// which version a list offers beyond them.
func TestVersionsOfAList(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, keys, offered, err string }{
		{"one that it speaks", `"cniVersion": "1.0.0"`, "", ""},
		{"one that it does not speak", `"cniVersion": "0.2.0"`, "", `its cniVersion is "0.2.0"`},
		{"none", `"disableCheck": false`, "", "its cniVersion is missing, which means 0.1.0"},
		{"several that it speaks", `"cniVersions": ["0.4.0", "1.0.0"]`, "", ""},
		{"several, and one for older runtimes", `"cniVersion": "0.4.0", "cniVersions": ["0.4.0", "1.0.0"]`, "", ""},
		{"several, and one for older runtimes that it does not speak", `"cniVersion": "0.2.0", "cniVersions": ["0.2.0", "1.0.0"]`, "", `its cniVersion is "0.2.0"`},
		{"one beyond", `"cniVersion": "1.0.0", "cniVersions": ["1.0.0", "1.2.0"]`, "1.2.0", ""},
		{"as new as the newest", `"cniVersion": "1.0.0", "cniVersions": ["1.0.0", "1.1.0"]`, "", ""},
	} {
		d := read(t, directory(t, map[string]string{"10-a.conflist": `{` + tt.keys + `, "name": "a", "plugins": [{"type": "bridge"}]}`}))
		for _, versions := range [][]string{{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}, {"1.1.0", "1.0.0", "0.4.0", "0.3.1"}} {
			offered, err := speaks(d, d.files[0], versions)
			if offered != tt.offered || tt.err == "" && err != nil || tt.err != "" && (!errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("%s: offers %q, %v", tt.name, offered, err)
			}
			p, _ := d.Put(keyOf("a"), versions)
			if notes := strings.Join(p.Notes, "\n"); strings.Contains(notes, "10-a.conflist offers CNI "+tt.offered) != (tt.offered != "") || tt.offered == "" && notes != "" {
				t.Errorf("%s: notes %q", tt.name, notes)
			}
		}
	}
}

package plugin

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/labels"
)

var selectors = []string{
	"", " ", "a", "!a", "! a", "a=1", "a = 1", "a==1", "a!=1", "a=", "a!=", "b", "!b", "b!=1", "b=", "a,b", "a,!b", "a=1,c=x", "a=2,c",
	"a in (1)", "a in (1,2)", "a in ( 2 , 3 )", "a notin (1)", "a notin (2)", "b in (1)", "b notin (1)", "e in (,x)", "e notin ()", "e in ()", "a in ()",
	"e=", "e", "e!=", "a in (2,)", "e in (x,,y)", "b in (,)", "a>0", "a>1", "a<2", "a < 1", "c>0", "b<1", "b>0", "a>x", "a>",
	"in", "in in (in)", "notin in (in)", "in=in", "!in", "example.com/x=y", "example.com/x in (y, z),a",
	",", "a,", ",a", "a b", "a in", "a in (", "a in (1", "a in (1 2)", "a in 1", "!a=1", "=1", "()", "a=1=2", "a=(", "a===1", "a!=!b",
}

// Whatever the library understands, the plugin understands the same way.
func FuzzSelector(f *testing.F) {
	for _, selector := range selectors {
		f.Add(selector, "1")
	}
	f.Add("c=x", "x")
	f.Fuzz(func(t *testing.T, selector, value string) {
		pod := map[string]string{"a": value, "c": "x", "e": "", "in": "in", "example.com/x": "y"}
		parsed, err := labels.Parse(selector)
		if err != nil || strings.Contains(selector, "\x00") {
			return // the agent refuses it; NUL, which no configuration can have, ends it for the library
		}
		got, err := selects(selector, pod)
		if want := parsed.Matches(labels.Set(pod)); err != nil || got != want {
			t.Errorf("selects(%q) is %v (%v), want %v", selector, got, err, want)
		}
	})
}

// What cannot be read is an error, so that the pod is recorded.
func TestSelectorDoesNotParse(t *testing.T) {
	for _, selector := range []string{",", "a,", ",a", "a b", "a in", "a in (", "a in (1", "a in (1 2)", "a in 1", "!a=1", "=1", "a=1=2", "a>x"} {
		if _, err := labels.Parse(selector); err == nil {
			t.Errorf("%q is valid", selector)
		}
		if got, err := selects(selector, nil); err == nil {
			t.Errorf("selects(%q) is %v, want an error", selector, got)
		}
	}
}

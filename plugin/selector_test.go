package plugin

import (
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/labels"
)

// selectorTexts are what people write, and what they get wrong.
var selectorTexts = []string{
	"", " ", "app", "!app", "! app", "app=echo", "app==echo", "app!=echo", "app = echo , tier != web", "app=", "app!=", "app=,tier", "app,",
	",app", "app in (echo)", "app in (echo,web)", "app in ()", "app notin (,)", "app in (,echo)", "app in (echo,)", "app in (a,,b)",
	"app in (a b)", "app in (a", "app in a", "app in", "app notin", "app in (in,notin)", "in in (in)", "notin", "in=in", "!in", "app=in",
	"!app=echo", "!app in (echo)", "!!app", "app===echo", "app=!echo", "app>1", "app<-1", "app>x", "app>", "app>1,app<3", "app=>1", "app><1",
	"k8s.io/app=echo", "K8s.io/app", "/app", "k8s.io/", "a/b/c", "a..b/c", "-a/b", "app=-echo", "app=echo-", "app=e_c.h-o", "app=é", "é=app",
	"app\t=\necho\r", "app=echo\x00", "\x00", "app\x00=echo", "app=()", "app()", "(app)", "app in ((a))", "app in (a))", "app echo", "app=a b",
	"app in (1,2)", "app=" + sixtyThree, "app=" + sixtyThree + "x", sixtyThree + "x", sixtyThree + "/" + sixtyThree, sixtyThree + "x/a", "app=!=b", "app!",
	"azAZ09=azAZ09", "z=Z", "A=0", "9=a", strings.Repeat("abcde.", 42) + "a/app", strings.Repeat("abcde.", 42) + "ab/app",
	"app,!tier,k8s.io/app in (a,b),number>5", "app in (=)", "app in (!)", "a=b,c", "a,b=", "<", ">", "=", "==", "!", "!=", ",", ",,", "a,,b", "a!b",
}

const sixtyThree = "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefghijk"

// labelSets meet some of the selectors and not others.
var labelSets = []map[string]string{
	nil, {"app": "echo"}, {"app": "web", "tier": "web"}, {"app": ""}, {"app": "2"}, {"app": "in"}, {"in": "in"}, {"notin": "", "k8s.io/app": "echo"},
	{"app": "a", "k8s.io/app": "b", "number": "7"}, {"app": "-2"}, {"app": "9223372036854775808"}, {"a": "b", "c": "", "b": ""}, {"app": sixtyThree},
}

func TestSelector(t *testing.T) {
	for _, text := range selectorTexts {
		sameAsLibrary(t, text)
	}
}

func FuzzSelector(f *testing.F) {
	for _, text := range selectorTexts {
		f.Add(text)
	}
	f.Fuzz(sameAsLibrary)
}

func sameAsLibrary(t *testing.T, text string) {
	want, wantErr := labels.Parse(text)
	if strings.ContainsRune(text, 0) {
		wantErr = errors.New("the library takes it for the end of the text, or passes it over")
	}
	got, err := parseSelector(text)
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("%q: error %v, and of the library %v", text, err, wantErr)
	}
	if err != nil {
		return
	}
	requirements, _ := want.Requirements()
	keys := map[string]bool{}
	sets := slices.Clone(labelSets)
	for _, r := range requirements {
		keys[r.Key()] = true
		for _, value := range append(r.ValuesUnsorted(), "other", "5") {
			for _, set := range labelSets {
				set = maps.Clone(set)
				if set == nil {
					set = map[string]string{}
				}
				set[r.Key()] = value
				sets = append(sets, set)
			}
		}
	}
	if gotKeys := got.keys(); !maps.Equal(gotKeys, keys) {
		t.Errorf("%q: keys %v, and of the library %v", text, gotKeys, keys)
	}
	for _, set := range sets {
		if matches := got.matches(set); matches != want.Matches(labels.Set(set)) {
			t.Errorf("%q with %v: %v, and the library says %v", text, set, matches, !matches)
		}
	}
}

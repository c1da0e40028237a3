package docs

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist"
)

// others are the commands of other programs that the documents use, beside those that TestCommands looks into.
func others() []string {
	return strings.Fields("[ cat cnitool cp curl docker echo export ip iptables-legacy iptables-legacy-save mkdir mount nft oc python3 sed sh tail unshare")
}

// TestCommands: what people are told to type has targets, subcommands, flags and values that exist.
func TestCommands(t *testing.T) {
	makefile := open(t, "Makefile").text
	values := map[string]any{}
	data, err := os.ReadFile(chart + "/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(data, &values); err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for _, d := range documents(t) {
		for _, b := range d.blocks(t) {
			if language, _, _ := strings.Cut(b.info, " "); language != "sh" {
				continue
			}
			for _, words := range commandsOf(b.text) {
				bad := func(format string, args ...any) {
					t.Errorf("%s:%d: %s: %s", d.path, b.line, strings.Join(words, " "), fmt.Sprintf(format, args...))
				}
				name := filepath.Base(words[0])
				seen[name]++
				switch name {
				case "make":
					for _, word := range words[1:] {
						if !strings.Contains(word, "=") && !regexp.MustCompile(`(?m)^`+word+`:.*## `).MatchString(makefile) {
							bad("make has no target %s", word)
						}
					}
				case "magic-ip-agent":
					if !strings.Contains(help(t), "\n  "+words[1]+" ") {
						bad("there is no command %s", words[1])
					} else if out, err := exec.CommandContext(t.Context(), agent, append(words[1:], "--help")...).CombinedOutput(); err != nil {
						bad("%v\n%s", err, out) // flags are parsed in their order, and help is the last of them
					}
				case "helm":
					if !slices.Contains([]string{"upgrade", "test", "uninstall", "mapkubeapis"}, words[1]) {
						bad("not a command that these tests know")
					}
					for i, word := range words {
						if words[i-min(i, 1)] == "--set" && !isValue(values, strings.Split(word, "=")[0]) {
							bad("the chart has no value %s", word)
						}
						if strings.HasPrefix(word, "charts/") {
							if _, err := os.Stat(filepath.Join(root, word, "Chart.yaml")); err != nil {
								bad("%v", err)
							}
						}
					}
					exists(words, "--values", bad)
				case "kubectl":
					if !slices.ContainsFunc(words, func(w string) bool {
						return slices.Contains([]string{"apply", "debug", "exec", "get", "magic-ip", "rollout", "run"}, w)
					}) {
						bad("not a command that these tests know")
					}
					exists(words, "--filename", bad)
				default:
					if !slices.Contains(others(), name) {
						bad("not a command that these tests know")
					}
				}
			}
		}
	}
	for name, least := range map[string]int{"make": 8, "magic-ip-agent": 12, "helm": 8, "kubectl": 8} {
		if seen[name] < least {
			t.Errorf("found %d commands of %s, fewer than %d", seen[name], name, least)
		}
	}
}

// exists reports files of the repository that a flag names and that are not there.
func exists(words []string, flag string, bad func(format string, args ...any)) {
	for i, word := range words[1:] {
		if words[i] == flag && word != "-" {
			if _, err := os.Stat(filepath.Join(root, word)); err != nil {
				bad("%v", err)
			}
		}
	}
}

// isValue reports whether the chart has the value a.b.c. What is a map of the user's own may have any key.
func isValue(values map[string]any, path string) bool {
	first, rest, more := strings.Cut(path, ".")
	value, found := values[first]
	below, isMap := value.(map[string]any)
	return found && (!more || isMap && (len(below) == 0 || isValue(below, rest)))
}

// commandsOf are the simple commands of a script, as words: what another command runs (kubectl exec … -- COMMAND, ip netns exec)
// is a command too.
func commandsOf(script string) (all [][]string) {
	script = strings.ReplaceAll(script, "\\\n", " ")
	script = regexp.MustCompile(`(?s)<<END\n.*?\nEND\n`).ReplaceAllString(script, "\n")
	var words []string
	var word strings.Builder
	quoted, begun := rune(0), false
	endWord := func() {
		if begun {
			words = append(words, word.String())
			word.Reset()
			begun = false
		}
	}
	endCommand := func() {
		endWord()
		for len(words) > 0 && regexp.MustCompile(`^[A-Z_]+=`).MatchString(words[0]) {
			words = words[1:]
		}
		if len(words) > 3 && words[0] == "ip" && words[1] == "netns" && words[2] == "exec" {
			words = words[4:]
		}
		if i := slices.Index(words, "--"); i >= 0 {
			if !slices.Contains(words[:i], "run") { // arguments of the image's own command
				all = append(all, words[i+1:])
			}
			words = words[:i]
		}
		if len(words) > 0 {
			all = append(all, words)
		}
		words = nil
	}
	runes := []rune(script)
	for i := 0; i < len(runes); i++ {
		switch r := runes[i]; {
		case quoted != 0 && r == quoted:
			quoted = 0
		case quoted != 0:
			word.WriteRune(r)
		case r == '\'' || r == '"':
			quoted, begun = r, true
		case r == '#' && !begun:
			for i < len(runes) && runes[i] != '\n' {
				i++
			}
			endCommand()
		case r == '>' || r == '<': // what follows is a file; a number before it is the descriptor's
			if regexp.MustCompile(`^\d$`).MatchString(word.String()) {
				word.Reset()
				begun = false
			}
			endWord()
			for i+1 < len(runes) && !strings.ContainsRune(" \n", runes[i+1]) {
				i++
			}
		case r == '|' || r == ';' || r == '&' || r == '\n':
			endCommand()
		case r == ' ':
			endWord()
		default:
			word.WriteRune(r)
			begun = true
		}
	}
	endCommand()
	return all
}

func TestCommandsOf(t *testing.T) {
	for script, want := range map[string]string{
		"make build tools # both\nmake":                      "[[make build tools] [make]]",
		"A='b c' d \\\n  --e=f 2>/g >h | i && j & k":         "[[d --e=f] [i] [j] [k]]",
		"ip netns exec x a -b '{c: d}'; kubectl e -- f g":    "[[a -b {c: d}] [f g] [kubectl e]]",
		"cat >/run/x <<END\nname: y\nEND\nz 'it''s' \"1 2\"": "[[cat] [z its 1 2]]",
	} {
		if got := fmt.Sprint(commandsOf(script)); got != want {
			t.Errorf("%q: %s, want %s", script, got, want)
		}
	}
}

// TestConfigurations: those of the agent parse, and those of CNI have the entry where and as it should be.
func TestConfigurations(t *testing.T) {
	agents, lists := 0, 0
	heredoc := regexp.MustCompile(`(?s)<<END\n(name: .*?\n)END\n`)
	for _, d := range documents(t) {
		for _, b := range d.blocks(t) {
			texts := []string{b.text}
			switch language, rest, _ := strings.Cut(b.info, " "); language {
			case "sh":
				texts = nil
				for _, match := range heredoc.FindAllStringSubmatch(b.text, -1) {
					texts = append(texts, match[1])
				}
				fallthrough
			case "yaml":
				for _, text := range texts {
					if !strings.Contains(text, "magicIPs:") {
						continue
					}
					agents++
					parsed, err := config.Parse(strings.NewReader(text), false)
					if err != nil {
						t.Errorf("%s:%d: %v", d.path, b.line, err)
					}
					for _, port := range parsed.Ports {
						if port.Unserved != "" {
							t.Errorf("%s:%d: %s is not served: %s", d.path, b.line, port.Frontend, port.Unserved)
						}
					}
				}
			case "json":
				lists++
				text := b.text
				if rest != "conflist" { // the entry alone
					text = `{"cniVersion": "1.1.0", "name": "pods", "plugins": [{"type": "ptp"}, ` + text + `]}`
				}
				checkConflist(t, fmt.Sprintf("%s:%d", d.path, b.line), text)
			}
		}
	}
	if agents < 3 || lists < 2 {
		t.Errorf("found %d configurations of the agent and %d of CNI", agents, lists)
	}
}

func checkConflist(t *testing.T, where, text string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "10-pods.conflist"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	read, err := conflist.Read(dir, conflist.Options{})
	if err != nil {
		t.Fatal(err)
	}
	view := read.View()
	if view.Unknown != nil || view.Blocked || view.Loads == "" || len(view.Entries) != 1 || view.Entries[0].First {
		t.Errorf("%s: %+v", where, view)
		return
	}
	_, dirErr := view.Entries[0].Dir()
	selectors, err := view.Entries[0].ByAgent()
	if dirErr != nil || err != nil || len(selectors) == 0 {
		t.Errorf("%s: %v, %v, selectors %v", where, dirErr, err, selectors)
	}
	for _, list := range selectors {
		for _, s := range list {
			text := fmt.Sprintf("name: a\nmagicIPs:\n- {ipAddress: 169.254.210.210, namespace: %q, selector: %q, ports: [{port: 1}]}\n", s.Namespace, s.Selector)
			if _, err := config.Parse(strings.NewReader(text), false); err != nil {
				t.Errorf("%s: %v", where, err)
			}
		}
	}
}

// TestWalkthroughs runs the blocks of a document that are to be typed one after the other, and compares what they print with what
// stands below them.
func TestWalkthroughs(t *testing.T) {
	for _, path := range []string{"docs/quickstart.md", "cni-conf/README.md"} {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			d := open(t, path)
			const separator = "\x1e"
			var script strings.Builder
			var screens []*block // nil where nothing stands below
			blocks := d.blocks(t)
			for i, b := range blocks {
				if b.info != "sh run" {
					continue
				}
				script.WriteString(b.text + "printf '" + separator + "'\n")
				screens = append(screens, nil)
				if i+1 < len(blocks) && blocks[i+1].info == "text output" {
					screens[len(screens)-1] = &blocks[i+1]
				}
			}
			const shell = "unshare --net --mount --pid --fork --kill-child --mount-proc bash"
			if !strings.Contains(d.text, "\n"+shell+"\n") || len(screens) < 2 {
				t.Fatalf("%s does not say in which shell, or has %d blocks", path, len(screens))
			}
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			defer cancel()
			arguments := strings.Fields(shell)
			command := exec.CommandContext(ctx, arguments[0], append(arguments[1:], "-e", "-c", script.String())...)
			command.Dir = root
			command.WaitDelay = 10 * time.Second
			var stdout, stderr bytes.Buffer
			command.Stdout, command.Stderr = &stdout, &stderr
			if err := command.Run(); err != nil {
				t.Fatalf("%v\n%s\n%s", err, &stdout, &stderr)
			}
			printed := strings.Split(stdout.String(), separator)
			if len(printed) != len(screens)+1 {
				t.Fatalf("%d blocks have printed %d times", len(screens), len(printed)-1)
			}
			lines := strings.SplitAfter(d.text, "\n")
			for i, screen := range slices.Backward(screens) { // so that the lines of those before it stay where they are
				switch got := stable(printed[i]); {
				case screen == nil && got != "":
					t.Errorf("%s: block %d prints, and the document does not show it:\n%s", path, i+1, got)
				case screen == nil || screen.text == got:
				case *update:
					lines = slices.Replace(lines, screen.line, screen.line+strings.Count(screen.text, "\n"), got)
				default:
					t.Errorf("%s:%d: run make docs. It prints\n%s\nand the document says\n%s", path, screen.line, got, screen.text)
				}
			}
			if *update {
				d.save(t, strings.Join(lines, ""))
			}
		})
	}
}

// stable is what is printed, with the same values for what differs each time, and no blanks at the end of lines.
func stable(text string) string {
	for pattern, value := range map[string]string{
		`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`: "2026-01-31T12:00:00Z",
		`veth[0-9a-f]{8}`:                         "veth12345678",
		`"crc32":"[0-9a-f]{8}"`:                   `"crc32":"12345678"`,
		`"hostIfIndex":\d+`:                       `"hostIfIndex":3`,
		`in [\d.]+[µm]?s;`:                        "in 250µs;",
		`\d+ ok, `:                                "20 ok, ",
		`(?m) +$`:                                 "",
	} {
		text = regexp.MustCompile(pattern).ReplaceAllString(text, value)
	}
	return text
}

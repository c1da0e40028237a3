package docs

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/integration/compat"
)

// TestGenerated: the parts between markers are what is written today.
func TestGenerated(t *testing.T) {
	for _, part := range []struct {
		document, name string
		write          func(t *testing.T) string
	}{
		{"docs/configuration.md", "keys", writeKeys},
		{"docs/configuration.md", "reserved", writeReserved},
		{"docs/configuration.md", "commands", writeCommands},
		{"docs/compatibility.md", "networks", func(t *testing.T) string { return compat.Table(rows(t)) }},
		{"docs/compatibility.md", "corpus", writeCorpus},
		{"README.md", "networks", func(t *testing.T) string { return compat.Short(rows(t)) }},
	} {
		t.Run(part.name, func(t *testing.T) {
			d := open(t, part.document)
			begin, end := "<!-- generated: "+part.name+" -->\n", "<!-- /generated -->"
			before, rest, found := strings.Cut(d.text, begin)
			got, after, ended := strings.Cut(rest, end)
			if !found || !ended {
				t.Fatalf("%s has no part %s", d.path, part.name)
			}
			want := "\n" + strings.TrimSpace(part.write(t)) + "\n\n"
			if got == want {
				return
			}
			if !*update {
				t.Fatalf("%s: part %s is stale: run make docs. It is\n%s\nand should be\n%s", d.path, part.name, got, want)
			}
			d.save(t, before+begin+want+end+after)
		})
	}
}

// rows are those of the table of networks, which belong to the results of tests that exist.
func rows(t *testing.T) []compat.Row {
	t.Helper()
	all, err := compat.Rows()
	if err != nil {
		t.Fatal(err)
	}
	tests := declared(t)
	for _, row := range all {
		for _, name := range slices.Concat(row.Tests, row.Links) {
			if !tests[name] {
				t.Errorf("rows.yaml: %s %s names %s, which does not exist", row.Network, row.Setting, name)
			}
		}
	}
	return all
}

// TestNetworksAreInTheTable: a network that a document names is in the table of docs/compatibility.md.
func TestNetworksAreInTheTable(t *testing.T) {
	table := compat.Table(rows(t))
	named := 0
	for _, path := range []string{"README.md", "docs/cni.md", "docs/concepts.md", "docs/cilium.md"} {
		for _, match := range regexp.MustCompile(`(?i)\b(calico|cilium|flannel|antrea|kube-ovn|ovn-kubernetes|weave|kindnet|kube-router|romana|canal|azure cni|aks|eks|gke|vpc cni|macvlan|ipvlan|istio|kata|gvisor|multus|openshift|k3s)\b`).FindAllString(open(t, path).text, -1) {
			named++
			if !strings.Contains(strings.ToLower(table), strings.ToLower(match)) && !slices.Contains([]string{"multus", "openshift"}, strings.ToLower(match)) { // no networks of pods' own
				t.Errorf("%s names %s, which is not in the table", path, match)
			}
		}
	}
	if named < 20 {
		t.Errorf("only %d names were found", named)
	}
}

func (d document) save(t *testing.T, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(root, d.path), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// key is a key of the configuration with its comment.
type key struct {
	name, standard, allowed string // standard is its default, or required
}

// configKeys are the keys of a struct of package config, by their comments: "Required. …" or "Default X. …".
func configKeys(t *testing.T, structure string) (keys []key) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), root+"/agent/config/config.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	comment := regexp.MustCompile("^(?:Default (none|`[^`]+`)|(Required))\\. (.+)$")
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok || spec.Name.Name != structure {
			return true
		}
		for _, field := range spec.Type.(*ast.StructType).Fields.List {
			tag, err := strconv.Unquote(field.Tag.Value)
			if err != nil {
				t.Fatal(err)
			}
			name := reflect.StructTag(tag).Get("yaml")
			text := strings.Join(strings.Fields(field.Doc.Text()), " ")
			match := comment.FindStringSubmatch(text)
			if match == nil {
				t.Fatalf("%s of %s: the comment begins with neither Required nor Default: %s", name, structure, text)
			}
			keys = append(keys, key{name, match[1] + strings.ToLower(match[2]), match[3]})
		}
		return false
	})
	if len(keys) == 0 {
		t.Fatalf("%s has no keys", structure)
	}
	return keys
}

func writeKeys(t *testing.T) string {
	var out strings.Builder
	for _, part := range []struct{ title, structure string }{
		{"", "rawConfig"}, {"Of each of `magicIPs`:", "rawMagicIP"}, {"Of each of `ports`:", "rawPort"},
	} {
		fmt.Fprintf(&out, "%s\n\n| key | default | allowed |\n|---|---|---|\n", part.title)
		for _, k := range configKeys(t, part.structure) {
			fmt.Fprintf(&out, "| `%s` | %s | %s |\n", k.name, k.standard, k.allowed)
		}
		out.WriteString("\n")
	}
	return out.String()
}

// TestDefaults: a key that is left out means what the comment says, and a required one cannot be left out.
func TestDefaults(t *testing.T) {
	base := func() (file, magicIP, port map[string]any) {
		port = map[string]any{"port": 9200}
		magicIP = map[string]any{"ipAddress": "169.254.210.210", "namespace": "default", "selector": "app=echo", "ports": []any{port}}
		return map[string]any{"name": "default.magic-ip", "magicIPs": []any{magicIP}}, magicIP, port
	}
	parse := func(t *testing.T, file any) (config.Config, error) {
		t.Helper()
		text, err := yaml.Marshal(file)
		if err != nil {
			t.Fatal(err)
		}
		return config.Parse(strings.NewReader(string(text)), false)
	}
	for i, structure := range []string{"rawConfig", "rawMagicIP", "rawPort"} {
		for _, k := range configKeys(t, structure) {
			t.Run(structure+"/"+k.name, func(t *testing.T) {
				file, magicIP, port := base()
				want, err := parse(t, file)
				if err != nil {
					t.Fatal(err)
				}
				owner := []map[string]any{file, magicIP, port}[i]
				switch text := strings.Trim(k.standard, "`"); {
				case text == "none":
					return
				case text == "required":
					delete(owner, k.name)
					if _, err := parse(t, file); err == nil || !strings.Contains(err.Error(), k.name) {
						t.Errorf("without %s: %v, want an error that names it", k.name, err)
					}
					return
				case text == "port":
					owner[k.name] = port["port"]
				case text == "true" || text == "false":
					owner[k.name] = text == "true"
				default:
					owner[k.name] = text
				}
				if got, err := parse(t, file); err != nil || !reflect.DeepEqual(got, want) {
					t.Errorf("%s: %v is not what leaving it out means: %v\n%+v\n%+v", k.name, owner[k.name], err, got, want)
				}
			})
		}
	}
}

func writeReserved(t *testing.T) string {
	data, err := os.ReadFile(chart + "/files/reserved.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var list yaml.Node
	if err := yaml.Unmarshal(data, &list); err != nil {
		t.Fatal(err)
	}
	out := "| addresses | used by |\n|---|---|\n"
	for pairs := list.Content[0].Content; len(pairs) > 0; pairs = pairs[2:] {
		var addresses []string
		for _, address := range pairs[1].Content {
			addresses = append(addresses, "`"+address.Value+"`")
		}
		out += fmt.Sprintf("| %s | %s |\n", strings.Join(addresses, ", "), pairs[0].Value)
	}
	return out
}

// help is what a command prints about itself, on a node without variables.
func help(t *testing.T, command ...string) string {
	t.Helper()
	run := exec.CommandContext(t.Context(), agent, append(command, "--help")...)
	run.Env = []string{"PATH=/nowhere"}
	out, err := run.CombinedOutput()
	if err != nil {
		t.Fatalf("magic-ip-agent %s: %v\n%s", command, err, out)
	}
	return string(out)
}

func writeCommands(t *testing.T) string {
	var out strings.Builder
	_, list, _ := strings.Cut(help(t), "Available Commands:\n")
	list, _, _ = strings.Cut(list, "\n\n")
	for line := range strings.Lines(list) {
		if name := strings.Fields(line)[0]; name != "help" {
			fmt.Fprintf(&out, "### magic-ip-agent %s\n\n```text\n%s```\n\n", name, help(t, name))
		}
	}
	return out.String()
}

func writeCorpus(t *testing.T) string {
	paths, err := filepath.Glob(root + "/integration/conflist/testdata/*.txtar")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no configurations: %v", err)
	}
	var all []string
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		source := regexp.MustCompile(`https://\S+`).FindString(string(data))
		all = append(all, fmt.Sprintf("[%s](%s)", strings.TrimSuffix(filepath.Base(path), ".txtar"), source))
	}
	return fmt.Sprintf("%d configurations:\n%s.", len(all), strings.Join(all, ",\n"))
}

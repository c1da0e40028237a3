package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// claims are the sentences of the chart that deny or confine something, each by a part of it that tells it from others, and the tests that
// try to break it: functions, unit tests of the chart (FILE: "it"), or a script. What is from documents alone says so where it stands.
var claims = map[string]string{
	"`Always`, `IfNotPresent` or `Never`":                        "syntax_test.yaml",
	"the keys beside it count only where it is something else":   "config_test.yaml: is magicIPs alone while the selector beside it is the placeholder",
	"Only pods that this controller owns":                        "TestAttacks TestOwners TestDeployment",
	"Only pods with this service account":                        "TestAttacks",
	"`require`: only ready ones":                                 "TestRequire",
	"`ignore`: readiness counts for nothing":                     "TestIgnore",
	"or `pass` (no rule applies)":                                "TestPackets",
	"addresses and prefixes that no magic IP may have":           "TestReservedAddressesOfTheOperator TestReservedAddressesAreTheAgents",
	"An upgrade cannot change it":                                "upgrade_test.yaml: rejects another name for the agent",
	"`auto` chooses iptables only if nftables cannot be used":    "TestSelectRemovesWhatAnotherBackendLeft",
	"no installer, and the node's CNI files are not touched":     "TestWithoutCNI",
	"An upgrade cannot switch it off":                            "upgrade_test.yaml: rejects cni.enabled: false",
	"`openshift` installs no plugin":                             "cni_test.yaml: installs no plugin on OpenShift, and knows its SELinux",
	"no token, no rights and no readiness":                       "TestWithoutAPI api_test.yaml: has no rights where it is off",
	"Pods that run already need no restart":                      "TestCommand TestOlderPod",
	"None is privileged, all capabilities are dropped":           "pod_test.yaml: is on the node's network, and never privileged",
	"NET_RAW, only with":                                         "pod_test.yaml: adds NET_RAW and the lock for iptables-legacy",
	"write `/run/xtables.lock`, only with":                       "pod_test.yaml: adds NET_RAW and the lock for iptables-legacy",
	"no capability | it places the plugin":                       "pod_test.yaml: gives the installer directories and no capability",
	"a ClusterRole only if one of them is":                       "rbac_test.yaml: has a ClusterRole only if all namespaces are served",
	"No port of the node is used unless":                         "TestNoPort metrics_test.yaml: listens nowhere by default",
	"no agent is scraped":                                        "TestAlerts",
	"a port of a magic IP has no endpoint on a node":             "TestAlerts",
	"it has none on any node":                                    "TestAlerts",
	"gets no ICMP error for an empty datagram":                   "TestHelmTest",
	"**A changed configuration** restarts nothing":               "pod_test.yaml: is the same pod whatever the configuration says, so that nothing restarts",
	"plugin's binary stays, and does nothing":                    "TestUninstall",
	"**An upgrade cannot change**":                               "upgrade_test.yaml: rejects another runtime directory",
	"Helm rejects it, if it can see the cluster":                 "upgrade_test.yaml: accepts all of that in another release",
	"the agent finds only pods whose labels the runtime passes":  "TestWithoutAPI",
	"**containerd passes none.**":                                "TestWithoutAPI",
	"The agent's container can read those only with":             "TestLeftoversThatCannotBeRead",
	"the rule gets no packet, since ours come first":             "TestLeftoverTranslation",
	"nobody may touch CNI":                                       "TestWithoutCNI",
	"The preset installs no CNI plugin":                          "cni_test.yaml: installs no plugin on OpenShift, and knows its SELinux",
	"and its only file is `00-multus.conf`":                      "not tested",
	"The directory has no sockets":                               "TestSettings",
	"`netfilter` (neither local routes nor masquerade)":          "TestChoose",
	"nothing restarts for it":                                    "pod_test.yaml: is the same pod whatever the configuration says, so that nothing restarts",
	"only one of them serves metrics":                            "TestMetricsOfTwoReleases",
	"Only pods whose labels the container":                       "TestWithoutAPI",
	"It takes no packet while":                                   "TestLeftoverTranslation",
	"and neither a shell nor a package manager":                  "integration/cluster/image",
	"kubectl run try-magic-ip --rm -i --restart=Never --image=b": "notes_test.yaml",
}

// TestChartClaims: each sentence of the chart that denies or confines something is one of claims, and what tries it exists.
func TestChartClaims(t *testing.T) {
	tests := declared(t)
	absolute := regexp.MustCompile(`(?i)\b(never|always|nothing|nobody|none|only|neither|cannot|no)\b`)
	said := map[string]bool{}
	for _, sentence := range chartSentences(t) {
		if !absolute.MatchString(strings.ReplaceAll(sentence, "read-only", "")) {
			continue
		}
		known := false
		for part := range claims {
			if strings.Contains(sentence, part) {
				said[part], known = true, true
			}
		}
		if !known {
			t.Errorf("nothing tries to break: %s", sentence)
		}
	}
	if len(said) < 40 {
		t.Errorf("only %d sentences were found", len(said))
	}
	for part, tried := range claims {
		if !said[part] {
			t.Errorf("the chart does not say any more: %s", part)
		}
		functions := regexp.MustCompile(`\bTest\w+`).FindAllString(tried, -1)
		for _, function := range functions {
			if !tests[function] {
				t.Errorf("%s: %s does not exist", part, function)
			}
		}
		file, it, _ := strings.Cut(regexp.MustCompile(`^(Test\w+ ?)*`).ReplaceAllString(tried, ""), ": ")
		switch {
		case file == "" && len(functions) > 0, file == "not tested":
		case strings.HasSuffix(file, ".yaml"):
			text, err := os.ReadFile(filepath.Join(chart, "tests", file))
			if err != nil || !strings.Contains(strings.ReplaceAll(string(text), "it: \"", "it: "), "it: "+it) {
				t.Errorf("%s: %s has no test %q (%v)", part, file, it, err)
			}
		default:
			if _, err := os.Stat(filepath.Join(root, file)); err != nil {
				t.Errorf("%s: %v", part, err)
			}
		}
	}
}

// chartSentences are those of the comments of values.yaml, of the README's template and of the notes, without code and templates.
func chartSentences(t *testing.T) (all []string) {
	t.Helper()
	read := func(file string) string { return open(t, "charts/magic-ip-address/"+file).text }
	var comments strings.Builder
	for _, match := range regexp.MustCompile(`(?m)^ *# (?:-- )?(.*)$`).FindAllStringSubmatch(read("values.yaml"), -1) {
		comments.WriteString(match[1] + "\n\n")
	}
	prose := regexp.MustCompile("(?s)```.*?```").ReplaceAllString(read("README.md.gotmpl"), "")
	notes := regexp.MustCompile(`(?s)\{\{.*?\}\}`).ReplaceAllString(read("templates/NOTES.txt"), "")
	for _, text := range []string{comments.String(), prose, notes} {
		text = regexp.MustCompile(`([.;])\s+|\n\n|\n- |\n\|`).ReplaceAllString(text, "$1\x00")
		for sentence := range strings.SplitSeq(text, "\x00") {
			all = append(all, strings.Join(strings.Fields(sentence), " "))
		}
	}
	return all
}

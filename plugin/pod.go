package plugin

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/magic-ip-address/magic-ip-address/agent/published"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
)

// pod is what CNI_ARGS tell of a pod. Empty where nobody told: cnitool, or a runtime without Kubernetes.
type pod struct {
	namespace, name, uid string
}

// LogValue implements slog.LogValuer.
func (p pod) LogValue() slog.Value {
	if p == (pod{}) {
		return slog.StringValue("")
	}
	return slog.StringValue(p.namespace + "/" + p.name)
}

// parseArgs reads CNI_ARGS, "K=V;K=V" in any order. The library's parser refuses what it does not know; odd
// arguments are no reason to fail a pod.
func parseArgs(args string) pod {
	var p pod
	for pair := range strings.SplitSeq(args, ";") {
		key, value, _ := strings.Cut(pair, "=")
		switch key {
		case "K8S_POD_NAMESPACE":
			p.namespace = value
		case "K8S_POD_NAME":
			p.name = value
		case "K8S_POD_UID":
			p.uid = value
		}
	}
	return p
}

// claim is an agent's interest in pods of some namespace.
type claim struct {
	agent, selector string
}

// claims are those on pods of namespace, in the order of the agents' names. A pod without a namespace is met by
// those on every namespace only.
func (c *conf) claims(namespace string) []claim {
	var claims []claim
	for _, agent := range slices.Sorted(maps.Keys(c.selectors)) {
		for _, selector := range c.selectors[agent] {
			if selector.Namespace == namespace || selector.Namespace == entry.EveryNamespace {
				claims = append(claims, claim{agent: agent, selector: selector.Selector})
			}
		}
	}
	return claims
}

// wanted says whether a pod with these labels (nil: not known) is to be recorded. When in doubt it is: the
// agent decides.
func wanted(claims []claim, podLabels map[string]string, log *slog.Logger) bool {
	record := podLabels == nil
	for _, claim := range claims {
		selector, err := labels.Parse(claim.selector)
		if err != nil {
			log.Warn("a selector does not parse; pods of its namespaces are recorded whatever their labels are",
				"agent", claim.agent, "selector", claim.selector, "error", err)
			record = true
			continue
		}
		record = record || selector.Matches(labels.Set(podLabels))
	}
	return record
}

// podLabels are the labels of the pod from the first who knows them: the runtime by either convention, or an agent
// with a claim on it. Nil: not known.
func podLabels(conf *conf, pod pod, claims []claim, agents []*published.Agent, log *slog.Logger) map[string]string {
	known, err := conf.labels()
	if err != nil {
		log.Warn("labels that the runtime passes are ignored", "error", err)
	}
	if known != nil || pod.uid == "" {
		return known
	}
	for _, agent := range agents {
		hasClaim := slices.ContainsFunc(claims, func(c claim) bool { return c.agent == agent.Name })
		if known := agent.Labels[pod.uid]; hasClaim && known != nil {
			return known
		}
	}
	return nil
}

// labels are those that the runtime passes with the configuration; nil where it passes none.
func (c *conf) labels() (map[string]string, error) {
	var runtimeConfig struct {
		Labels map[string]string `json:"labels"`
	}
	if len(c.runtimeConfig) > 0 {
		if err := json.Unmarshal(c.runtimeConfig, &runtimeConfig); err != nil {
			return nil, fmt.Errorf("runtimeConfig: %w", err)
		}
	}
	if runtimeConfig.Labels != nil {
		return runtimeConfig.Labels, nil
	}
	var args struct {
		CNI struct {
			Labels []struct{ Key, Value string } `json:"labels"`
		} `json:"cni"`
	}
	if len(c.args) > 0 {
		if err := json.Unmarshal(c.args, &args); err != nil {
			return nil, fmt.Errorf("args: %w", err)
		}
	}
	if args.CNI.Labels == nil {
		return nil, nil
	}
	known := make(map[string]string, len(args.CNI.Labels))
	for _, label := range args.CNI.Labels {
		known[label.Key] = label.Value
	}
	return known, nil
}

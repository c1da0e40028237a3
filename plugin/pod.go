package plugin

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// pod is the identity of a pod in CNI_ARGS. Empty where there is none: cnitool, or a runtime without Kubernetes.
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

// parseArgs reads CNI_ARGS, "K=V;K=V" in any order. The library's parser rejects unknown and malformed
// pairs; they are no reason to fail a pod.
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

// claims are those on pods of namespace, in the order of the agents' names. A pod without a namespace has those
// on every namespace only.
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

// match reports whether a pod is to be recorded, and with which labels: those that the selectors of the claims ask for. Nil is
// not known. When in doubt the pod is recorded: the agent decides. Where the runtime passes no labels, each agent's selectors
// meet the labels that this agent itself has reported: it cannot speak for others.
func (c *conf) match(pod pod, claims []claim, agents map[string]*runtimedir.Pods, log *slog.Logger) (wanted bool, record map[string]string) {
	passed, err := c.labels()
	if err != nil {
		log.Warn("labels that the runtime passes are ignored", "error", err)
	}
	record, complete := map[string]string{}, true
	for _, claim := range claims {
		selector, err := parseSelector(claim.selector)
		if err != nil {
			log.Warn("a selector does not parse; pods of its namespaces are recorded whatever their labels are",
				"agent", claim.agent, "selector", claim.selector, "error", err)
			wanted, complete = true, complete && passed != nil
			continue
		}
		known := passed
		if agent := agents[claim.agent]; known == nil && agent != nil && pod.uid != "" {
			known = agent.LabelsOf(runtimedir.PodID{Namespace: pod.namespace, Name: pod.name, UID: pod.uid})
		}
		known = runtimedir.KeepLabels(known, selector.keys())
		wanted = wanted || known == nil || selector.matches(known)
		complete = complete && known != nil
		for key, value := range known {
			if other, ok := record[key]; ok && other != value {
				complete = false
			}
			record[key] = value
		}
	}
	if !complete {
		return wanted, nil
	}
	return wanted, record
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

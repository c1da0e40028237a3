package endpoint

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
)

// maxReasons bounds what Why returns.
const maxReasons = 5

// Why says, a sentence each, why a selection for which Choose returns nothing has no endpoint: what excludes each pod that comes
// close, or that none does.
func (i *Index) Why(s *Selection) (reasons []string) {
	inNamespace, unlabelled := 0, 0
	for _, target := range i.targets {
		if s.inNamespace(target) {
			inNamespace++
			if target.Labels == nil {
				unlabelled++
			}
		}
	}
	candidates := i.targets
	if len(s.Selector.anyOf) > 0 {
		candidates = nil
		for _, l := range s.Selector.anyOf {
			candidates = append(candidates, i.byLabel[l]...)
		}
	}
	for _, target := range candidates {
		if target.Labels == nil || !s.Selector.Matches(labels.Set(target.Labels)) {
			continue
		}
		if reason := s.excludes(target); reason != "" {
			reasons = append(reasons, fmt.Sprintf("pod %s/%s %s", target.Namespace, target.Name, reason))
		}
	}
	slices.Sort(reasons)
	if more := len(reasons) - maxReasons; more > 0 {
		reasons = append(reasons[:maxReasons], fmt.Sprintf("excluded as well: %d more that the selector matches", more))
	}
	where := "namespace " + s.Namespace
	if s.Namespace == inventory.AllNamespaces {
		where = "any namespace"
	}
	if unlabelled > 0 {
		reasons = append(reasons, fmt.Sprintf("the labels of %s of %s on this node are not known", pods(unlabelled), where))
	}
	switch {
	case len(reasons) > 0:
	case inNamespace == 0:
		reasons = []string{"no pod of " + where + " is known on this node"}
	default:
		reasons = []string{fmt.Sprintf("%s of %s on this node, and none matches the selector", pods(inNamespace), where)}
	}
	return reasons
}

// pods is how many, in words that fit the number.
func pods(n int) string {
	if n == 1 {
		return "1 pod"
	}
	return fmt.Sprintf("%d pods", n)
}

func (s *Selection) inNamespace(t *inventory.Target) bool {
	return s.Namespace == inventory.AllNamespaces || s.Namespace == t.Namespace
}

// excludes is why a target that the selector matches is no endpoint; empty where it could be one.
func (s *Selection) excludes(t *inventory.Target) string {
	_, hasAddress := s.address(t)
	switch {
	case !s.inNamespace(t):
		return "is in another namespace than " + s.Namespace
	case s.Owner != "" && !slices.Contains(t.Owners, s.Owner):
		return "is not controlled by " + s.Owner
	case s.ServiceAccount != "" && s.ServiceAccount != t.ServiceAccount:
		return fmt.Sprintf("has service account %q, and serviceAccount is %s", t.ServiceAccount, s.ServiceAccount)
	case t.Finished:
		return "has finished"
	case s.Readiness == Require && !t.Ready && t.Terminating:
		return "is terminating and not ready, and readiness is require"
	case s.Readiness == Require && !t.Ready:
		return "is not ready, and readiness is require"
	case s.rank(t) == never:
		return "does not run yet"
	case hasAddress:
		return ""
	case s.PortName != "" && !slices.ContainsFunc(t.Ports, s.named):
		return s.withoutPort(t)
	}
	return s.withoutAddress(t)
}

// withoutAddress is about a target that has no address of the family.
func (s *Selection) withoutAddress(t *inventory.Target) string {
	family := map[bool]string{false: "IPv4", true: "IPv6"}[s.IPv6]
	for _, u := range t.Unusable {
		if u.IP.Is6() == s.IPv6 {
			return fmt.Sprintf("has no %s address that can be an endpoint: %s is %s", family, u.IP, u.Reason)
		}
	}
	switch {
	case len(t.IPs) > 0:
		return fmt.Sprintf("has no %s address, only %s", family, list(t.IPs))
	case len(t.Unusable) > 0:
		return fmt.Sprintf("has no %s address, and %s is %s", family, t.Unusable[0].IP, t.Unusable[0].Reason)
	}
	return "has no address"
}

// withoutPort is about a target that has no container port of the name and protocol.
func (s *Selection) withoutPort(t *inventory.Target) string {
	text := fmt.Sprintf("has no container port named %s for %s", s.PortName, strings.ToUpper(string(s.PortProtocol)))
	for _, p := range t.Ports {
		if p.Name == s.PortName {
			return text + ", only for " + strings.ToUpper(string(p.Protocol))
		}
	}
	return text
}

func list(addresses []netip.Addr) string {
	words := make([]string, len(addresses))
	for i, address := range addresses {
		words[i] = address.String()
	}
	return strings.Join(words, ", ")
}

package backend

import (
	"context"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/agent/iptables"
	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/program"
)

// Tools are the versions of the commands that make rules, as they print them; those that are missing are not named.
func Tools(ctx context.Context) []string {
	var found []string
	for _, command := range []string{"nft", "iptables-nft", "iptables-legacy", "iptables"} {
		if out, err := program.Output(ctx, program.Timeout, "", command, "--version"); err == nil {
			name := ""
			if version := strings.TrimSpace(out); !strings.HasPrefix(version, command+" ") {
				name = command + ": "
			}
			found = append(found, name+strings.TrimSpace(out))
		}
	}
	return found
}

// Trial says why nftables cannot be used on this node; nil where it can. Nothing is loaded.
func Trial(ctx context.Context) error {
	nft, err := nftables.New("trial")
	if err != nil {
		return err
	}
	_, err = nft.Trial(ctx)
	return err
}

// Inspect says in which respects the rules in the kernel differ from what the agent called agentName serves, and
// changes nothing. Of in it needs the services, the links of pods, the uplinks and the addresses of the node.
func Inspect(ctx context.Context, backendName, agentName string, in plan.Input) ([]string, error) {
	p := plan.Build(in)
	if backendName == NFTables {
		return nftables.Inspect(agentName, &p)
	}
	return iptables.Inspect(ctx, agentName, &p)
}

package doctor

import (
	"os"
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/agent/ruleset"
)

// TestCommands: the commands that say what to do are for any name that links and chains can have.
func TestCommands(t *testing.T) {
	nodetest.Namespace(t, "")
	for _, name := range []string{"eth0.100", "$(id)", `a"b;c`, "-n"} {
		nodetest.Run(t, "ip", "link", "add", "name", name, "type", "ifb")
		nodetest.Run(t, "sh", "-c", setOf(name, "rp_filter", 2))
		path := "/proc/sys/net/ipv4/conf/" + name + "/rp_filter"
		if value, err := os.ReadFile(path); err != nil || strings.TrimSpace(string(value)) != "2" {
			t.Errorf("%s: rp_filter is %q, %v", setOf(name, "rp_filter", 2), value, err)
		}
	}
	for command, want := range map[string]string{
		nftName{"inet", "$(id)", "c"}.list("--handle"):                                                             "nft --handle list chain inet '$(id)' c",
		acceptBefore("iptables-nft", "filter", "FORWARD", ruleset.Packet{In: "$(id)", Out: "b", Translated: true}): "iptables-nft -t filter -I FORWARD -i '$(id)' -o b -j ACCEPT",
	} {
		if command != want {
			t.Errorf("%s, want %s", command, want)
		}
	}
}

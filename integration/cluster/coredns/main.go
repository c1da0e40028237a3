// Command coredns is CoreDNS with the plugins that a cache on a node needs, and with the zone that it asks for in the tests.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/forward"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/template"
)

func main() {
	// In the order in which a query passes them, as CoreDNS' own plugin.cfg has it.
	dnsserver.Directives = []string{"health", "ready", "errors", "cache", "template", "forward"}
	coremain.Run()
}

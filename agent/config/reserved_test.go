package config

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

func TestReservedAddresses(t *testing.T) {
	for _, r := range reserved() {
		if !r.IsValid() || r.use == "" || r.Masked() != r.Prefix {
			t.Errorf("%+v is not a reservation", r)
		}
	}
	// One of each owner, by the word that names it.
	for address, owner := range map[string]string{
		"169.254.169.254": "most clouds", "fd00:ec2::254": "EC2", "169.254.169.253": "VPC", "fd00:ec2::253": "VPC",
		"169.254.169.123": "time service of Amazon", "fd00:ec2::123": "time service of Amazon", "169.254.170.2": "ECS",
		"169.254.170.23": "EKS", "fd00:ec2::23": "EKS", "169.254.173.7": "VPC CNI", "fd00::ac:1": "VPC CNI", "169.254.1.1": "Calico",
		"169.254.171.9": "VPC Lattice", "fd00:ec2:80::a9fe:ab21": "VPC Lattice", "fd00:a9fe:a9fe::1": "Akamai", "169.254.42.1": "Cilium",
		"fd20:ce::254": "Google", "169.254.169.252": "GKE", "168.63.129.16": "Azure", "169.254.10.10": "AKS",
		"169.254.0.2": "Oracle", "169.254.2.9": "Oracle", "fd00:c1::a9fe:a9fe": "Oracle", "100.100.100.200": "Alibaba", "100.100.2.137": "Alibaba",
		"169.254.0.23": "Tencent", "169.254.42.42": "Scaleway", "fd00:42::42": "Scaleway", "169.254.20.10": "NodeLocal", "169.254.25.10": "Kubespray",
		"169.254.116.108": "Talos", "169.254.7.127": "Istio", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff": "Istio",
		"169.254.169.1": "OVN-Kubernetes", "fd69::2": "OVN-Kubernetes", "169.254.0.253": "Antrea", "fc01::aabb:ccdd:eeff": "Antrea",
	} {
		reason := unusable(netip.MustParseAddr(address), false, nil)
		if !strings.Contains(reason, " belongs to ") || !strings.Contains(reason, owner) || !strings.Contains(reason, "allowReserved") {
			t.Errorf("%s: %q does not name %s", address, reason, owner)
		}
		if reason := unusable(netip.MustParseAddr(address), true, nil); reason != "" {
			t.Errorf("%s with allowReserved: %q", address, reason)
		}
	}
	// What is in use with chart 0.1.0 and in the documents stays usable.
	for _, address := range []string{"169.254.210.210", "169.254.169.8", "169.254.0.1", "169.254.7.126", "100.100.100.201", "fd00:a9fe:d2d2::1", "fd00:ec2::1"} {
		if reason := unusable(netip.MustParseAddr(address), false, nil); reason != "" {
			t.Errorf("%s: %s", address, reason)
		}
	}
}

func TestReservedAddressesOfTheOperator(t *testing.T) {
	parse := func(reserved string) (Config, error) {
		return Parse(strings.NewReader(fmt.Sprintf(`name: a
reservedAddresses: %s
magicIPs:
- {ipAddress: 169.254.100.7, namespace: default, selector: app=a, ports: [{port: 80}]}
- {ipAddress: 169.254.100.7, namespace: default, selector: app=a, ports: [{port: 81}], allowReserved: true}
- {ipAddress: 169.254.101.7, namespace: default, selector: app=a, ports: [{port: 80}]}
`, reserved)), true)
	}
	config, err := parse("[169.254.100.0/24, fd00::1]")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"169.254.100.7 is in 169.254.100.0/24 of reservedAddresses; set allowReserved: true to use it anyway", "", ""}
	for i, port := range config.Ports {
		if port.Unserved != want[i] {
			t.Errorf("port %d: %q, want %q", i, port.Unserved, want[i])
		}
	}
	if mapped, err := parse(`["::ffff:169.254.100.0/120"]`); err != nil || mapped.Ports[0].Unserved != want[0] {
		t.Errorf("an IPv4 prefix written as IPv6: %v, %v", mapped, err)
	}
	if all, err := parse(`["::ffff:0.0.0.0/96"]`); err != nil || !strings.HasPrefix(all.Ports[0].Unserved, "169.254.100.7 is in 0.0.0.0/0 of reservedAddresses") {
		t.Errorf("all of IPv4 written as IPv6: %v, %v", all, err)
	}
	for _, wrong := range []string{"169.254.100", "169.254.0.0/33", "fe80::1%eth0", ""} {
		if _, err := parse(fmt.Sprintf("[%q]", wrong)); err == nil || !strings.Contains(err.Error(), "line 2: reservedAddresses[0]") {
			t.Errorf("%q: %v", wrong, err)
		}
	}
}

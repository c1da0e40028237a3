package config

import (
	"fmt"
	"net/netip"
	"slices"
)

// reservation is a prefix that is not for magic IPs, and its use.
type reservation struct {
	netip.Prefix
	use string
}

// reserve makes a reservation of addresses and prefixes.
func reserve(use string, prefixes ...string) []reservation {
	var all []reservation
	for _, text := range prefixes {
		prefix, _ := parsePrefix(text) // a constant; the tests parse each
		all = append(all, reservation{prefix, use})
	}
	return all
}

// parsePrefix parses a prefix, or an address as the prefix of its full length.
func parsePrefix(text string) (netip.Prefix, error) {
	if address, err := netip.ParseAddr(text); err == nil && address.Zone() == "" {
		return netip.PrefixFrom(address.Unmap(), address.Unmap().BitLen()), nil
	}
	prefix, err := netip.ParsePrefix(text)
	if bits := prefix.Bits() - 96; err == nil && prefix.Addr().Is4In6() && bits >= 0 {
		prefix = netip.PrefixFrom(prefix.Addr().Unmap(), bits)
	}
	return prefix.Masked(), err
}

// reserved are the addresses of clouds and cluster components. A magic IP at one of them breaks the node, or sends requests
// for credentials of the cloud to the endpoint. Each is taken from its owner's documents or source code.
func reserved() []reservation {
	return slices.Concat(
		// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html
		// https://learn.microsoft.com/en-us/azure/virtual-machines/instance-metadata-service
		// https://cloud.google.com/compute/docs/metadata/querying-metadata
		// https://docs.oracle.com/en-us/iaas/Content/Compute/Tasks/gettingmetadata.htm (with DNS and NTP)
		reserve("the instance metadata service of most clouds", "169.254.169.254"),

		// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html
		reserve("the instance metadata service of Amazon EC2", "fd00:ec2::254"),
		// https://docs.aws.amazon.com/vpc/latest/userguide/AmazonDNS-concepts.html
		reserve("the DNS resolver of Amazon VPC", "169.254.169.253", "fd00:ec2::253"),
		// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/configure-ec2-ntp.html
		reserve("the time service of Amazon EC2", "169.254.169.123", "fd00:ec2::123"),
		// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2launch.html (routes for Windows activation)
		reserve("the Windows activation service of Amazon EC2", "169.254.169.250", "169.254.169.251", "fd00:ec2::250"),
		// https://docs.aws.amazon.com/AmazonECS/latest/developerguide/task-metadata-endpoint-v4.html
		reserve("the task credentials of Amazon ECS", "169.254.170.2"),
		// https://docs.aws.amazon.com/eks/latest/userguide/pod-id-agent-setup.html
		reserve("the pod identity agent of Amazon EKS", "169.254.170.23", "fd00:ec2::23"),
		// https://github.com/aws/amazon-vpc-cni-k8s/blob/master/cmd/routed-eni-cni-plugin/driver/driver.go
		// https://docs.tigera.io/calico/latest/reference/faq
		reserve("the pods' gateway of Calico and the Amazon VPC CNI", "169.254.1.1"),
		// https://docs.aws.amazon.com/eks/latest/best-practices/ipv6.html (IPv4 of IPv6 pods)
		// https://github.com/aws/amazon-vpc-cni-k8s/blob/master/cmd/egress-cni-plugin/netconf/netconf.go
		reserve("the egress network of the Amazon VPC CNI", "169.254.172.0/22", "fd00::ac:0/118"),

		// https://docs.aws.amazon.com/vpc-lattice/latest/ug/security-groups.html
		// https://aws.amazon.com/blogs/networking-and-content-delivery/managing-dns-resolution-with-amazon-vpc-lattice-and-vpc-resources
		reserve("the services of Amazon VPC Lattice", "169.254.171.0/24", "fd00:ec2:80::/64"),

		// https://cloud.google.com/compute/docs/metadata/querying-metadata (IPv6-only instances)
		reserve("the metadata server of Google Compute Engine", "fd20:ce::254"),
		// https://cloud.google.com/kubernetes-engine/docs/concepts/workload-identity
		reserve("the metadata server of GKE", "169.254.169.252"),

		// https://learn.microsoft.com/en-us/azure/virtual-network/what-is-ip-address-168-63-129-16
		reserve("the platform services of Azure", "168.63.129.16"),
		// https://learn.microsoft.com/en-us/azure/aks/localdns-custom
		reserve("LocalDNS of AKS", "169.254.10.10", "169.254.10.11"),

		// https://docs.oracle.com/en-us/iaas/Content/Compute/Tasks/gettingmetadata.htm
		reserve("the instance metadata service of Oracle Cloud", "fd00:c1::a9fe:a9fe"),
		// https://docs.oracle.com/en-us/iaas/Content/Compute/References/images.htm (boot volume, kernel updates, block volumes)
		reserve("the volumes and updates of Oracle Cloud instances", "169.254.0.2", "169.254.0.3", "169.254.2.0/24"),

		// https://www.alibabacloud.com/help/en/ecs/user-guide/view-instance-metadata
		reserve("the instance metadata service of Alibaba Cloud", "100.100.100.200"),
		// https://www.alibabacloud.com/help/en/dns/pvtz-add-forwarding-rule (addresses that the system reserves)
		reserve("the DNS resolver of Alibaba Cloud", "100.100.2.116/31", "100.100.2.118", "100.100.2.136/31", "100.100.2.138"),
		// https://www.tencentcloud.com/document/product/213/4934
		reserve("the instance metadata service of Tencent Cloud", "169.254.0.23"),
		// https://techdocs.akamai.com/cloud-computing/docs/metadata-service-api
		reserve("the instance metadata service of Akamai (Linode)", "fd00:a9fe:a9fe::1"),
		// https://www.scaleway.com/en/docs/instances/how-to/use-cloud-init/
		// https://github.com/scaleway/scaleway-sdk-go/blob/master/api/instance/v1/instance_metadata_sdk.go
		reserve("the instance metadata service of Scaleway", "169.254.42.42", "fd00:42::42"),

		// https://kubernetes.io/docs/tasks/administer-cluster/nodelocaldns/
		reserve("NodeLocal DNSCache", "169.254.20.10"),
		// https://github.com/kubernetes-sigs/kubespray/blob/master/docs/advanced/dns-stack.md
		reserve("NodeLocal DNSCache as Kubespray sets it up", "169.254.25.10"),
		// https://docs.siderolabs.com/talos/v1.12/networking/host-dns
		reserve("the host DNS of Talos Linux", "169.254.116.108"),
		// https://istio.io/latest/docs/ambient/usage/networkpolicy/
		// https://github.com/istio/istio/blob/master/cni/pkg/nodeagent/options.go
		reserve("the kubelet's probes in Istio's ambient mode", "169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"),
		// https://github.com/ovn-kubernetes/ovn-kubernetes/blob/master/go-controller/pkg/config/config.go (masquerade subnets)
		// The larger ones of OpenShift 4.17 are in docs/configuration.md only: clusters without OpenShift can use them.
		reserve("the gateways of OVN-Kubernetes", "169.254.169.0/29", "fd69::/125"),
		// https://github.com/cilium/cilium/blob/main/pkg/defaults/defaults.go (pods that reach themselves by a Service have this source)
		reserve("the service loopback of Cilium", "169.254.42.1"),
		// https://github.com/antrea-io/antrea/blob/main/pkg/agent/config/service_config.go
		reserve("the virtual addresses of Antrea", "169.254.0.252", "169.254.0.253", "fc01::aabb:ccdd:eefe", "fc01::aabb:ccdd:eeff"),
	)
}

// unusable is the reason why an address cannot be a magic IP; empty where it can. own is what the operator has reserved.
func unusable(address netip.Addr, allowReserved bool, own []netip.Prefix) string {
	switch {
	case address.IsUnspecified(), address.IsLoopback(), address.IsMulticast(), address == netip.MustParseAddr("255.255.255.255"):
		return fmt.Sprintf("%s is an unspecified, loopback, multicast or broadcast address; allowed: a unicast address that the node does not own, such as 169.254.210.210", address)
	case address.Is6() && address.IsLinkLocalUnicast():
		return fmt.Sprintf("%s is an IPv6 link-local address, which is not routed; allowed: a unique local address such as fd00:a9fe:d2d2::1", address)
	case allowReserved:
		return ""
	}
	const anyway = "set allowReserved: true to use it anyway"
	for _, prefix := range own {
		if prefix.Contains(address) {
			return fmt.Sprintf("%s is in %s of reservedAddresses; %s", address, prefix, anyway)
		}
	}
	for _, r := range reserved() {
		if r.Contains(address) {
			return fmt.Sprintf("%s belongs to %s; %s", address, r.use, anyway)
		}
	}
	return ""
}

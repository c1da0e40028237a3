// Package config reads an agent's configuration, from YAML or from the environment variables of the original tool, and
// validates it: what it returns has all defaults filled in and no optional value left.
package config

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/magic-ip-address/magic-ip-address/agent/dataplane"
	"github.com/magic-ip-address/magic-ip-address/agent/endpoint"
	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// Config is a validated configuration.
type Config struct {
	// Name identifies the rules and files of this agent on a node.
	Name         string
	PollInterval time.Duration
	// Ports are the ports of all magic IPs, in the order of the file.
	Ports []Port
	// DataPlane is what carries the packets of pods.
	DataPlane dataplane.Mode
	// Verbose enables debug logs (VERBOSE of the original tool).
	Verbose bool
	// Hash is the beginning of the SHA-256 of the text that it was read from, 12 hexadecimal digits; Parse leaves it empty.
	Hash string
}

// Port is one port of a magic IP: the frontend that clients connect to, the selection of its targets, and the policy.
type Port struct {
	plan.Frontend
	endpoint.Selection
	// SelectorText is the selector as written in the file.
	SelectorText  string
	HostInterface []string // empty is auto
	NoEndpoint    plan.Action
	HoldFor       time.Duration
	HostClients   bool
	ExcludeTarget bool
	// Unserved is the reason why this port cannot be served; empty where it can.
	Unserved string
}

// Namespaces are those of the ports, each once.
func (c *Config) Namespaces() []string {
	var namespaces []string
	for _, port := range c.Ports {
		if !slices.Contains(namespaces, port.Namespace) {
			namespaces = append(namespaces, port.Namespace)
		}
	}
	return namespaces
}

// Addresses are the magic IPs.
func (c *Config) Addresses() []netip.Addr {
	addresses := make([]netip.Addr, len(c.Ports))
	for i, port := range c.Ports {
		addresses[i] = port.Address
	}
	return addresses
}

// Query is what the agent needs of the Kubernetes API for this configuration.
func (c *Config) Query() inventory.Query {
	query := inventory.Query{Namespaces: c.Namespaces(), LabelKeys: c.LabelKeys(), PortNames: map[string]bool{}}
	for _, port := range c.Ports {
		if port.PortName != "" {
			query.PortNames[port.PortName] = true
		}
		if owner, err := inventory.ParseOwner(port.Owner); err == nil {
			wanted := inventory.OwnerQuery{Namespace: port.Namespace, Owner: owner}
			if !slices.Contains(query.Owners, wanted) {
				query.Owners = append(query.Owners, wanted)
			}
		}
	}
	return query
}

// LabelKeys are the label keys that the selectors look at.
func (c *Config) LabelKeys() map[string]bool {
	keys := map[string]bool{}
	for _, port := range c.Ports {
		for _, key := range port.Selector.Keys() {
			keys[key] = true
		}
	}
	return keys
}

// The configuration file as written, before validation. The comments of its keys are the tables of docs/configuration.md, which
// `make docs` writes: the default, or that there is none, and after the first full stop what is allowed.
type rawConfig struct {
	// Required. 1 to 117 characters of `a-z 0-9 - .`, the first and last a letter or digit. Names the rules (`magic-ip-<name>`) and the
	// directory `agents/<name>/`; cannot change while the agent runs
	Name string `yaml:"name"`
	// Default `5s`. `1s` to `1h`: how often records, links and rules are compared although no change was reported
	PollInterval string `yaml:"pollInterval"`
	// Default `auto`. What carries the packets of pods: `auto` (on nodes with Cilium, its settings in force are read and followed),
	// `netfilter` (neither local routes nor masquerade, whatever is there) or `cilium` (as `auto`, and while Cilium's settings cannot be
	// read, they are taken for BPF host routing)
	DataPlane string `yaml:"dataPlane"`
	// Default none. A list of addresses and prefixes that no magic IP may have, besides the [known ones](#reserved-addresses)
	Reserved []*string `yaml:"reservedAddresses"`
	// Required. A list with one or more of the following
	MagicIPs []*rawMagicIP `yaml:"magicIPs"`
}

type rawMagicIP struct {
	// Required. An IPv4 or IPv6 address that the node does not own; see [Reserved addresses](#reserved-addresses)
	IPAddress string `yaml:"ipAddress"`
	// Required. The namespace of the targets, or `"*"` for all
	Namespace string `yaml:"namespace"`
	// Required. A Kubernetes label selector, all of its grammar; not the empty one
	Selector *string `yaml:"selector"`
	// Default none. Only pods of this controller, such as `DaemonSet/apm-server`: the UID in the pod's controller reference must be that of
	// the live object; a Deployment owns pods by its ReplicaSets. Kinds other than DaemonSet, Deployment, Job, ReplicaSet,
	// ReplicationController and StatefulSet are written `group/version/Kind/name`. An error with `--no-api`
	Owner string `yaml:"owner"`
	// Default none. Only pods with this service account, whose use RBAC and admission can restrict. An error with `--no-api`
	ServiceAccount string `yaml:"serviceAccount"`
	// Default `auto`. Where clients are: `auto` ([by evidence](concepts.md#whose-packets-are-served)), or interface names separated by commas, a
	// trailing `+` for a prefix (`cni0`, `cali+`)
	HostInterface string `yaml:"hostInterface"`
	// Required. A list with one or more of the keys below
	Ports []*rawPort `yaml:"ports"`
	// Default `prefer`. `prefer`: ready pods first; `require`: only ready pods, an error with `--no-api`; `ignore`: a pod that is not
	// terminating counts as ready
	Readiness string `yaml:"readiness"`
	// Default `single`. `single`: the newest of the best targets; `random`: new flows are spread over all targets of the best rank
	Distribution string `yaml:"distribution"`
	// Default `reject`. `reject`, `hold`, `pass`: what happens to packets while there is [no endpoint](concepts.md#packets)
	NoEndpoint string `yaml:"noEndpoint"`
	// Default `10s`. With `hold`: whole seconds, `1s` to `1h`
	HoldFor string `yaml:"holdFor"`
	// Default `true`. `false`: packets of the node's own processes are exempt: they go where they would go without a magic IP
	HostClients *bool `yaml:"hostClients"`
	// Default `false`. `true`: packets of the target itself are exempt
	ExcludeTarget bool `yaml:"excludeTarget"`
	// Default `false`. `true`: use the address although it is [reserved](#reserved-addresses)
	AllowReserved bool `yaml:"allowReserved"`
}

type rawPort struct {
	// Required. 1 to 65535
	Port int `yaml:"port"`
	// Default `port`. 1 to 65535, or the name of a container port (of a native sidecar's too), which each pod may map to another number; a name
	// is an error with `--no-api`
	TargetPort targetPort `yaml:"targetPort"`
	// Default `tcp`. `tcp`, `udp`, `sctp`
	Protocol string `yaml:"protocol"`
}

// targetPort is a number or a container port name.
type targetPort string

func (t *targetPort) UnmarshalYAML(node *yaml.Node) error {
	if node.Kind != yaml.ScalarNode || node.Tag != "!!int" && node.Tag != "!!str" {
		return &yaml.TypeError{Errors: []string{fmt.Sprintf("line %d: targetPort: %s is not allowed", node.Line, described(node))}}
	}
	*t = targetPort(node.Value)
	return nil
}

// Load reads the configuration from the file at path, or from the environment where path is empty; see Parse.
func Load(path string, noAPI bool) (Config, error) {
	if path == "" {
		return FromEnv(os.Getenv, noAPI)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return Config{}, err
	}
	config, err := Parse(bytes.NewReader(data), noAPI)
	if err != nil {
		return Config{}, fmt.Errorf("%s:\n%w", path, err)
	}
	config.Hash = hash(data)
	return config, nil
}

// Parse reads a configuration file (YAML). Unknown keys, wrong types and values that are not allowed are
// errors that name the line, the key and what is allowed; all errors are returned together, in the order of their lines. With noAPI the agent does not ask
// the Kubernetes API, and keys that depend on the API are errors.
func Parse(r io.Reader, noAPI bool) (Config, error) {
	data, err := io.ReadAll(r)
	if err != nil {
		return Config{}, err
	}
	var raw rawConfig
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	decoder.KnownFields(true)
	decodeErr := decoder.Decode(&raw)
	var misshapen *yaml.TypeError
	switch {
	case errors.Is(decodeErr, io.EOF):
		return Config{}, errors.New("the file is empty; name and magicIPs are needed")
	case decodeErr != nil && !errors.As(decodeErr, &misshapen):
		return Config{}, errors.New(strings.TrimPrefix(decodeErr.Error(), "yaml: "))
	}
	if err := decoder.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return Config{}, errors.New("the file holds more than one YAML document; one is allowed")
	}
	v := validator{noAPI: noAPI}
	config := v.config(raw)
	if len(v.errs) == 0 && decodeErr == nil {
		return config, nil
	}
	// Once more, with line numbers: they cost as much as all the rest.
	var document yaml.Node
	if err := yaml.Unmarshal(data, &document); err != nil {
		return Config{}, errors.New(strings.TrimPrefix(err.Error(), "yaml: "))
	}
	v = validator{document: &document, noAPI: noAPI, inside: map[*yaml.Node]bool{}}
	if decodeErr == nil || v.shape(document.Content[0], reflect.TypeFor[rawConfig](), nil) {
		config = v.config(raw)
	}
	if len(v.errs) == 0 { // the decoder has the last word
		return Config{}, decodeErr
	}
	return config, v.err()
}

func hash(text []byte) string {
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:6])
}

// FromEnv makes a configuration of the environment variables of the original bash tool. getenv is os.Getenv. Its errors begin with
// the flag that would make the variables unnecessary.
func FromEnv(getenv func(string) string, noAPI bool) (Config, error) {
	const needed = "SELECTOR"
	if getenv(needed) == "" {
		return Config{}, errors.New("--config FILE is missing. Without a file the environment variables of kube-magic-ip-address count, and " + needed + " is not set")
	}
	config, err := fromEnv(getenv, noAPI)
	if err != nil {
		return Config{}, fmt.Errorf("without --config, from the environment:\n%w", err)
	}
	return config, nil
}

func fromEnv(getenv func(string) string, noAPI bool) (Config, error) {
	or := func(value, otherwise string) string {
		if value == "" {
			return otherwise
		}
		return value
	}
	port := func(name string) (int, error) {
		value := or(getenv(name), getenv("PORT"))
		number, err := strconv.Atoi(value)
		if err != nil || number < 1 || number > 65535 {
			return 0, fmt.Errorf("environment variable %s (or PORT) is %q; allowed: 1 to 65535", name, value)
		}
		return number, nil
	}
	magicPort, portErr := port("MAGIC_PORT")
	seconds, pollErr := strconv.Atoi(or(getenv("POLL_INTERVAL"), "5"))
	if pollErr != nil || seconds < 1 {
		pollErr = fmt.Errorf("environment variable POLL_INTERVAL is %q; allowed: whole seconds, at least 1", getenv("POLL_INTERVAL"))
	}
	if err := errors.Join(portErr, pollErr); err != nil {
		return Config{}, err
	}
	namespace := or(getenv("NAMESPACE"), "default")
	address := or(getenv("MAGIC_IP"), "169.254.210.210")
	selector := getenv("SELECTOR")
	raw := rawConfig{
		Name:         strings.ToLower(namespace + "." + strings.NewReplacer(".", "-", ":", "-").Replace(address)),
		PollInterval: (time.Duration(seconds) * time.Second).String(),
		MagicIPs: []*rawMagicIP{{
			IPAddress: address, Namespace: namespace, Selector: &selector, HostInterface: getenv("HOST_INTERFACE"),
			Ports: []*rawPort{{Port: magicPort, TargetPort: targetPort(or(getenv("TARGET_PORT"), getenv("PORT"))), Protocol: getenv("PROTOCOL")}},
		}},
	}
	v := validator{noAPI: noAPI}
	config := v.config(raw)
	config.Hash = hash(fmt.Appendf(nil, "%+v %s", raw, selector))
	config.Verbose = getenv("VERBOSE") != "" && getenv("VERBOSE") != "false" && getenv("VERBOSE") != "0"
	return config, v.err()
}

// validator turns the raw configuration into the validated one and collects the errors.
type validator struct {
	document *yaml.Node // nil: errors name no line
	noAPI    bool
	errs     []lineError
	// misshapen are the paths whose values are of a wrong type, or have a wrong key: nothing more is to be said of them.
	misshapen [][]any
	// aliases is how many were followed, inside the nodes that the present ones stand for.
	aliases int
	inside  map[*yaml.Node]bool
	// namespaces is the pattern of allowed namespaces, compiled once: there may be thousands of magic IPs.
	namespaces *regexp.Regexp
	// reserved are the operator's reservedAddresses.
	reserved []netip.Prefix
}

// lineError is an error in a line of the document; 0 without a document.
type lineError struct {
	line int
	error
}

// err is all errors in the order of their lines.
func (v *validator) err() error {
	slices.SortStableFunc(v.errs, func(a, b lineError) int { return a.line - b.line })
	all := make([]error, len(v.errs))
	for i, e := range v.errs {
		all[i] = e.error
	}
	return errors.Join(all...)
}

// bad adds an error at a path of mapping keys (string) and list positions (int), unless there is one of its shape.
func (v *validator) bad(path []any, format string, args ...any) {
	if !v.isMisshapen(path, 0) {
		v.badAt(lineOf(v.document, path), path, format, args...)
	}
}

// badAt adds an error at a path, in a line.
func (v *validator) badAt(line int, path []any, format string, args ...any) {
	var text strings.Builder
	for _, step := range path {
		switch s := step.(type) {
		case int:
			fmt.Fprintf(&text, "[%d]", s)
		default:
			if text.Len() > 0 {
				text.WriteByte('.')
			}
			fmt.Fprint(&text, s)
		}
	}
	location := ""
	if line > 0 {
		location = fmt.Sprintf("line %d: ", line)
	}
	if text.Len() > 0 {
		text.WriteString(": ")
	}
	v.errs = append(v.errs, lineError{line, fmt.Errorf("%s%s%s", location, text.String(), fmt.Sprintf(format, args...))})
}

// lineOf finds the line of a path, or of its longest prefix in the document; 0 without a document.
func lineOf(node *yaml.Node, path []any) int {
	if node == nil || len(node.Content) == 0 {
		return 0
	}
	node = node.Content[0]
	line := node.Line
	for _, step := range path {
		var next *yaml.Node
		switch s := step.(type) {
		case int:
			if node.Kind == yaml.SequenceNode && s < len(node.Content) {
				next = node.Content[s]
				line = next.Line
			}
		case string:
			if node.Kind != yaml.MappingNode {
				break
			}
			for pair := range slices.Chunk(node.Content, 2) {
				if pair[0].Value == s {
					line, next = pair[0].Line, pair[1]
				}
			}
		}
		if next == nil {
			return line
		}
		node = next
	}
	return line
}

// oneOf validates an enumeration. An empty value means the first of allowed.
func oneOf[T ~string](v *validator, value string, path []any, allowed ...T) T {
	if value == "" {
		return allowed[0]
	}
	if !slices.Contains(allowed, T(value)) {
		words := make([]string, len(allowed))
		for i, word := range allowed {
			words[i] = string(word)
		}
		v.bad(path, "%q is not allowed; allowed: %s", value, strings.Join(words, ", "))
	}
	return T(value)
}

const maxNameLength = 117 // as a Helm release of 53 characters in a namespace of 63

// CheckName returns an error where name cannot be the name of an agent.
func CheckName(name string) error {
	if !regexp.MustCompile(`^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$`).MatchString(name) || len(name) > maxNameLength {
		return fmt.Errorf("%q is not allowed; allowed: 1 to %d of a-z, 0-9, - and ., the first and last a letter or digit", name, maxNameLength)
	}
	return nil
}

func (v *validator) config(raw rawConfig) Config {
	config := Config{Name: raw.Name, PollInterval: 5 * time.Second}
	if err := CheckName(raw.Name); err != nil {
		v.bad([]any{"name"}, "%v", err)
	}
	if raw.PollInterval != "" {
		d, err := time.ParseDuration(raw.PollInterval)
		if err != nil || d < time.Second || d > time.Hour {
			v.bad([]any{"pollInterval"}, "%q is not allowed; allowed: a duration from 1s to 1h, such as 5s", raw.PollInterval)
		}
		config.PollInterval = d
	}
	config.DataPlane = oneOf(v, raw.DataPlane, []any{"dataPlane"}, dataplane.Auto, dataplane.Netfilter, dataplane.Cilium)
	for i, text := range raw.Reserved {
		const allowed = "an address, or a prefix such as 169.254.100.0/24"
		if v.null(text == nil, []any{"reservedAddresses", i}, allowed) {
			continue
		}
		prefix, err := parsePrefix(*text)
		if err != nil {
			v.bad([]any{"reservedAddresses", i}, "%q is not allowed; allowed: %s", *text, allowed)
			continue
		}
		v.reserved = append(v.reserved, prefix)
	}
	if len(raw.MagicIPs) == 0 {
		v.bad([]any{"magicIPs"}, "is empty; at least one is needed")
	}
	claimed := map[plan.Frontend]string{}
	for i, magicIP := range raw.MagicIPs {
		if v.null(magicIP == nil, []any{"magicIPs", i}, "a mapping") {
			continue
		}
		for _, port := range v.magicIP(*magicIP, []any{"magicIPs", i}) {
			if first, twice := claimed[port.Frontend]; twice && port.Unserved == "" {
				port.Unserved = fmt.Sprintf("%s is claimed twice in this configuration: %s has it", port.Frontend, first)
			} else if !twice {
				claimed[port.Frontend] = fmt.Sprintf("magicIPs[%d] (%s, %s)", i, magicIP.Namespace, port.SelectorText)
			}
			config.Ports = append(config.Ports, port)
		}
	}
	return config
}

// null adds an error where an entry of a list is null, which the decoder takes for none, and returns whether it is.
func (v *validator) null(is bool, path []any, allowed string) bool {
	if is {
		v.bad(path, "null is not allowed; allowed: %s", allowed)
	}
	return is
}

// owner validates the keys that say who may be a target, beside the selector.
func (v *validator) owner(raw rawMagicIP, port *Port, at func(...any) []any) {
	port.ServiceAccount = raw.ServiceAccount
	if raw.ServiceAccount != "" && !regexp.MustCompile(`^[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?$`).MatchString(raw.ServiceAccount) {
		v.bad(at("serviceAccount"), "%q is not allowed; allowed: the name of a service account in the targets' namespace", raw.ServiceAccount)
	}
	if raw.Owner != "" {
		owner, err := inventory.ParseOwner(raw.Owner)
		if err != nil {
			v.bad(at("owner"), "%v", err)
		}
		port.Owner = owner.String()
	}
	for key, value := range map[string]string{"owner": raw.Owner, "serviceAccount": raw.ServiceAccount} {
		if value != "" && v.noAPI {
			v.bad(at(key), "needs the Kubernetes API, which --no-api rules out")
		}
	}
}

func (v *validator) magicIP(raw rawMagicIP, path []any) []Port {
	at := func(keys ...any) []any { return append(slices.Clone(path), keys...) }
	port := Port{HostClients: true, ExcludeTarget: raw.ExcludeTarget}

	address, err := netip.ParseAddr(raw.IPAddress)
	if err != nil || address.Zone() != "" {
		v.bad(at("ipAddress"), "%q is not allowed; allowed: an IPv4 or IPv6 address such as 169.254.210.210 or fd00:a9fe:d2d2::1", raw.IPAddress)
	}
	port.Address = address.Unmap()
	port.IPv6 = port.Address.Is6()
	if port.Address.IsValid() {
		port.Unserved = unusable(port.Address, raw.AllowReserved, v.reserved)
	}

	port.Namespace = raw.Namespace
	if v.namespaces == nil {
		v.namespaces = regexp.MustCompile(`^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?|\*)$`)
	}
	if !v.namespaces.MatchString(raw.Namespace) {
		v.bad(at("namespace"), "%q is not allowed; allowed: the name of a namespace, or \"*\" for all", raw.Namespace)
	}
	if raw.Selector == nil {
		v.bad(at("selector"), "is missing; allowed: a Kubernetes label selector such as app=apm-server")
	} else {
		port.SelectorText = *raw.Selector
		if port.Selector, err = endpoint.ParseSelector(*raw.Selector); err != nil {
			v.bad(at("selector"), "%q is not a Kubernetes label selector: %v", *raw.Selector, err)
		} else if port.Selector.Empty() {
			v.bad(at("selector"), "selects every pod; allowed: a Kubernetes label selector such as app=apm-server")
		}
	}
	v.owner(raw, &port, at)
	port.HostInterface = v.hostInterface(raw.HostInterface, at("hostInterface"))
	port.Readiness = oneOf(v, raw.Readiness, at("readiness"), endpoint.Prefer, endpoint.Require, endpoint.Ignore)
	if v.noAPI && port.Readiness == endpoint.Require {
		v.bad(at("readiness"), "require needs the Kubernetes API, which --no-api rules out")
	}
	port.Spread = oneOf(v, raw.Distribution, at("distribution"), "single", "random") == "random"
	port.NoEndpoint = oneOf(v, raw.NoEndpoint, at("noEndpoint"), plan.Reject, plan.Hold, plan.Pass)
	port.HoldFor = 10 * time.Second
	if raw.HoldFor != "" {
		d, err := time.ParseDuration(raw.HoldFor)
		if err != nil || d < time.Second || d%time.Second != 0 || d > time.Hour {
			v.bad(at("holdFor"), "%q is not allowed; allowed: whole seconds from 1s to 1h", raw.HoldFor)
		}
		port.HoldFor = d
	}
	if raw.HostClients != nil {
		port.HostClients = *raw.HostClients
	}
	if len(raw.Ports) == 0 {
		v.bad(at("ports"), "is empty; at least one port is needed")
	}
	var ports []Port
	for i, rawPort := range raw.Ports {
		if v.null(rawPort == nil, at("ports", i), "a mapping") {
			continue
		}
		p := port
		p.TargetPort, p.PortName = 0, ""
		v.port(&p, *rawPort, at("ports", i))
		ports = append(ports, p)
	}
	return ports
}

func (v *validator) port(p *Port, raw rawPort, path []any) {
	at := func(key string) []any { return append(slices.Clone(path), key) }
	if raw.Port < 1 || raw.Port > 65535 {
		v.bad(at("port"), "%d is not allowed; allowed: 1 to 65535", raw.Port)
	}
	p.Port = uint16(raw.Port)
	p.Protocol = oneOf(v, strings.ToLower(raw.Protocol), at("protocol"), plan.TCP, plan.UDP, plan.SCTP)
	if raw.TargetPort == "" {
		p.TargetPort = uint16(raw.Port)
		return
	}
	number, err := strconv.Atoi(string(raw.TargetPort))
	switch {
	case err == nil && number >= 1 && number <= 65535:
		p.TargetPort = uint16(number)
	case err == nil || !regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?$`).MatchString(string(raw.TargetPort)):
		v.bad(at("targetPort"), "%q is not allowed; allowed: 1 to 65535, or the name of a container port", raw.TargetPort)
	case v.noAPI:
		v.bad(at("targetPort"), "the name %q needs the Kubernetes API, which --no-api rules out; allowed: 1 to 65535", raw.TargetPort)
	default:
		p.PortName, p.PortProtocol = string(raw.TargetPort), p.Protocol
	}
}

// hostInterface parses auto, or a comma-separated list of interface names. A trailing + is a wildcard, as in iptables.
func (v *validator) hostInterface(value string, path []any) []string {
	if value == "" || value == "auto" {
		return nil
	}
	names := strings.Split(value, ",")
	for i, name := range names {
		names[i] = strings.TrimSpace(name)
		// IFNAMSIZ is 16 with the closing zero (linux/if.h); iptables and nft count the wildcard.
		if !regexp.MustCompile(`^[^\s/:+*"]+\+?$`).MatchString(names[i]) || len(names[i]) > 15 {
			v.bad(path, "%q is not allowed; allowed: auto, or interface names of at most 15 characters, which include a trailing + for a prefix, separated by commas", value)
			return nil
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

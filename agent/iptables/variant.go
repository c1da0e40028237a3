package iptables

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/program"
)

// Variant is one of the two kinds of rules that iptables commands edit.
type Variant struct {
	// suffix of the commands' names. Without one they are those that the distribution, or the image, has
	// chosen.
	suffix string
	Legacy bool
	// Reason for the choice.
	Reason string
}

func (v Variant) command(family plan.Family) string {
	if family == plan.IPv6 {
		return "ip6tables" + v.suffix
	}
	return "iptables" + v.suffix
}

// Variants are those whose commands are there, the default one last.
func Variants(ctx context.Context) []Variant {
	var found []Variant
	for _, v := range []Variant{{suffix: "-nft"}, {suffix: "-legacy", Legacy: true}} {
		if present("iptables" + v.suffix) {
			found = append(found, v)
		}
	}
	if version, err := outputAgain(ctx, "iptables", "--version"); err == nil {
		found = append(found, Variant{Legacy: !strings.Contains(version, "(nf_tables)")})
	}
	return found
}

// Unreadable is why this process can neither read nor remove rules of the variant, of which there may be some; empty where it can, or
// there are none.
func (v Variant) Unreadable() string {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); !v.Legacy || err == nil && data[0].Effective&(1<<unix.CAP_NET_RAW) != 0 {
		return ""
	}
	for _, family := range plan.Families() {
		for _, table := range []string{"filter", "nat", "mangle"} {
			switch inUse, err := LegacyTable(family, table); {
			case err != nil:
				return fmt.Sprintf("whether the table %s of %s is in use cannot be read: %v", table, v.command(family), err)
			case inUse:
				return fmt.Sprintf("the table %s of %s is in use, and cannot be read without CAP_NET_RAW", table, v.command(family))
			}
		}
	}
	return ""
}

// InUse is the variant that kubelet uses on this node: rules in the other one would come before
// or after kube-proxy's whatever the order of the jumps. kubelet makes a chain for others to tell it by
// (KUBE-IPTABLES-HINT, KEP-3178); older ones have a canary. A node without either uses the default. So does one where a variant cannot
// be read, and the reason says so.
func InUse(ctx context.Context) (Variant, error) {
	found := Variants(ctx)
	var unread error
	for _, v := range found {
		for _, family := range plan.Families() {
			command := v.command(family)
			if !present(command) {
				continue
			}
			if v.Legacy {
				inUse, err := LegacyTable(family, "mangle")
				if err != nil {
					unread = err
				}
				if !inUse {
					continue
				}
			}
			for _, chain := range []string{"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"} {
				exists, err := chainExists(ctx, command, chain)
				if exists {
					v.Reason = "kubelet uses it: chain " + chain + " is there"
					return v, nil
				}
				if err != nil {
					unread = err
					break // the lock is waited for each time
				}
			}
		}
	}
	if len(found) == 0 {
		return Variant{}, errors.New("no iptables command is there")
	}
	v := found[len(found)-1]
	v.Reason = "kubelet has left no hint"
	if unread != nil {
		v.Reason = "it is not known which one kubelet uses: " + unread.Error()
	}
	return v, nil
}

// chainExists reports whether the table mangle has a chain. iptables exits with 1 where it has none, and with another status where it
// cannot say.
func chainExists(ctx context.Context, command, chain string) (bool, error) {
	_, err := outputAgain(ctx, command, "--wait", fmt.Sprint(lockWaitAtEnd), "-t", "mangle", "-S", chain, "1")
	if exit := new(exec.ExitError); errors.As(err, &exit) && exit.ExitCode() == 1 {
		return false, nil
	}
	return err == nil, locked(err)
}

// outputAgain is what a program prints. Where it fails for a reason that may pass, it is run again.
func outputAgain(ctx context.Context, name string, args ...string) (out string, err error) {
	err = program.Retry(ctx, func() (err error) {
		out, err = program.Output(ctx, program.Timeout, "", name, args...)
		return err
	})
	return out, err
}

func present(command string) bool {
	_, err := exec.LookPath(command)
	return err == nil
}

// LegacyTable reports whether a legacy table is in use. To ask iptables-legacy would bring it into use.
func LegacyTable(family plan.Family, table string) (bool, error) {
	file := "/proc/thread-self/net/ip_tables_names"
	if family == plan.IPv6 {
		file = "/proc/thread-self/net/ip6_tables_names"
	}
	names, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) { // the kernel has none
		return false, nil
	}
	return slices.Contains(strings.Fields(string(names)), table), err
}

// Package plugin is the CNI plugin: chained behind the plugin that assigns addresses, it records the
// attachments of the pods that an agent on this node wants to know of, and passes the result through.
//
// It fails open. It adds reachability, not security, so no fault of its own fails an ADD: it logs and
// passes through, and the agent finds out by other ways. Errors are only a configuration that is not
// usable and a missing prevResult. DEL always succeeds.
//
// Limits: it does local file work only, and waits for its turn for at most lockWait. It never speaks to the
// API server and never enters the sandbox.
package plugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/magic-ip-address/magic-ip-address/agent/published"
	"github.com/magic-ip-address/magic-ip-address/plugin/state"
)

// lockWait bounds how long a pod may be kept by another process that holds the lock of the state file.
const lockWait = time.Second

// Plugin is the plugin with the streams of its process.
type Plugin struct {
	Stdout io.Writer // protocol: the result of ADD, nothing else
	Stderr io.Writer // the log, where the log file cannot be written
}

// Versions are the versions of the CNI specification that the plugin speaks. Older ones have results of
// another shape.
func Versions() version.PluginInfo {
	return version.PluginSupports("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
}

// Funcs are the commands, for skel.
func (p Plugin) Funcs() skel.CNIFuncs {
	return skel.CNIFuncs{Add: p.add, Del: p.del, Check: check, GC: p.gc, Status: status}
}

func (p Plugin) add(args *skel.CmdArgs) error {
	conf, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	result, err := conf.result()
	if err != nil {
		return err
	}
	pod := parseArgs(args.Args)
	// No claim is the common case: no file is touched.
	if claims := conf.claims(pod.namespace); len(claims) > 0 {
		p.record(args, conf, pod, claims, result)
	}
	if _, err := p.Stdout.Write(result); err != nil {
		return types.NewError(types.ErrIOFailure, fmt.Sprintf("writing the result: %v", err), "")
	}
	return nil
}

// record records the pod if one of the claims is on it, or could be. What goes wrong is logged here.
func (p Plugin) record(args *skel.CmdArgs, conf *conf, pod pod, claims []claim, result json.RawMessage) {
	log := p.logger(conf.runtimeDir, "ADD").With("containerID", args.ContainerID, "pod", pod)
	// The log is in there too.
	if err := os.MkdirAll(conf.runtimeDir, 0o755); err != nil {
		log.Error("the pod is not recorded", "error", err)
		return
	}
	agents := liveAgents(conf.runtimeDir, log)
	labels := podLabels(conf, pod, claims, agents, log)
	if !wanted(claims, labels, log) {
		return
	}
	interfaces, err := parseInterfaces(result)
	if err != nil {
		log.Error("the pod is not recorded", "error", err)
		return
	}
	addrs, ignored := interfaces.addresses(args.IfName)
	if ignored != nil {
		log.Warn("addresses in prevResult are ignored", "error", ignored)
	}
	if len(addrs) == 0 {
		log.Warn("the pod is not recorded: prevResult has no address of its interface", "ifName", args.IfName)
		return
	}
	attachment := state.Attachment{
		ContainerID:   args.ContainerID,
		IfName:        args.IfName,
		Network:       conf.network,
		Namespace:     pod.namespace,
		Name:          pod.name,
		UID:           pod.uid,
		Labels:        labels,
		IPs:           addrs,
		HostInterface: interfaces.host(driver),
		Netns:         args.Netns,
		AddedAt:       time.Now().UTC(),
	}
	// Gone with the dead is the record of an earlier ADD of the same.
	if err := update(conf.runtimeDir, log, append(dead(agents), attachment.Key()), attachment); err != nil {
		log.Error("the pod is not recorded", "error", err)
	}
}

func (p Plugin) del(args *skel.CmdArgs) error {
	// A configuration that is not usable still tells where the records are. The selectors do not count: they may
	// have changed since the ADD.
	conf, _, _ := parseCommon(args.StdinData)

	// Without a record of ours nothing is touched and no lock is waited for. Reading first is safe: the file is
	// replaced as a whole, a record stays in it from the end of its ADD on, and a runtime does not call DEL
	// while the ADD of the same container runs. (An ADD that outlived its runtime could come later than any
	// lock as well; its record falls to the agent.)
	key := state.Key{ContainerID: args.ContainerID, IfName: args.IfName}
	recorded, err := state.Recorded(conf.runtimeDir, key)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !recorded {
		return nil
	}
	log := p.logger(conf.runtimeDir, "DEL").With("containerID", args.ContainerID, "pod", parseArgs(args.Args))
	gone := dead(liveAgents(conf.runtimeDir, log))
	if err := update(conf.runtimeDir, log, append(gone, key)); err != nil {
		log.Error("the record of the pod may stay", "error", err)
	}
	return nil
}

// check compares the record with prevResult. No record is no fault: the pod may be older than the plugin.
func check(args *skel.CmdArgs) error {
	conf, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	result, err := conf.result()
	if err != nil {
		return err
	}
	interfaces, err := parseInterfaces(result)
	if err != nil {
		return err
	}
	attachments, err := state.Read(conf.runtimeDir)
	if err != nil {
		// Fails open: without records there is nothing to compare, and the next ADD says what is wrong.
		return nil
	}
	key := state.Key{ContainerID: args.ContainerID, IfName: args.IfName}
	i := slices.IndexFunc(attachments, func(a state.Attachment) bool { return a.Key() == key })
	if i < 0 {
		return nil
	}
	want, _ := interfaces.addresses(args.IfName) // ADD has logged what is ignored
	got := attachments[i].IPs
	slices.SortFunc(want, netip.Addr.Compare)
	slices.SortFunc(got, netip.Addr.Compare)
	if !slices.Equal(want, got) {
		return fmt.Errorf("%s of %s has %v recorded, and %v in prevResult: recreate the pod",
			args.IfName, args.ContainerID, got, want)
	}
	return nil
}

func (p Plugin) gc(args *skel.CmdArgs) error {
	conf, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	valid, err := conf.validAttachments()
	if err != nil || valid == nil {
		return err
	}
	log := p.logger(conf.runtimeDir, "GC")
	gone := dead(liveAgents(conf.runtimeDir, log))
	attachments, _ := state.Read(conf.runtimeDir) // what is wrong with the file, the update says
	for _, a := range attachments {
		if a.Network == conf.network && !valid[a.Key()] {
			gone = append(gone, a.Key())
		}
	}
	err = update(conf.runtimeDir, log, gone)
	switch {
	case errors.Is(err, fs.ErrNotExist): // no runtime dir, so no records
		return nil
	case errors.Is(err, state.ErrBusy):
		return types.NewError(types.ErrTryAgainLater, err.Error(), "")
	}
	return err
}

// status fails only where ADD would: a failure makes the whole node NotReady.
func status(args *skel.CmdArgs) error {
	_, err := parseConf(args.StdinData)
	return err
}

// update changes the state file and logs what it met there.
func update(dir string, log *slog.Logger, gone []state.Key, add ...state.Attachment) error {
	warning, err := state.Update(dir, lockWait, gone, add...)
	if warning != nil {
		log.Warn("the state file was not usable", "error", warning)
	}
	return err
}

// liveAgents are the agents that run on this node. What the file of another says may have been overtaken.
func liveAgents(dir string, log *slog.Logger) []*published.Agent {
	names, err := published.Names(dir)
	if err != nil {
		log.Warn("the agents' files cannot be listed", "error", err)
	}
	var agents []*published.Agent
	for _, name := range names {
		if !published.Live(dir, name) {
			continue
		}
		agent, err := published.Read(dir, name)
		if err != nil {
			log.Warn("an agent's file is not usable", "error", err)
			continue
		}
		agents = append(agents, agent)
	}
	return agents
}

// dead are the attachments that agents know to be gone, though no DEL came for them.
func dead(agents []*published.Agent) (keys []state.Key) {
	for _, agent := range agents {
		for _, attachment := range agent.Dead {
			keys = append(keys, state.Key(attachment))
		}
	}
	return keys
}

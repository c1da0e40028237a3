// Package plugin is the CNI plugin: chained behind the plugin that assigns addresses, it records the
// attachments of the pods that an agent on this node has selectors for, and passes the result through.
//
// It fails open. It adds reachability, not security, so no fault of its own fails an ADD: it logs and
// passes through, and the agent finds the pod by the API. Errors are only a configuration that is not
// usable and a missing prevResult. DEL always succeeds.
//
// What it reads of agents comes from containers. It is used for what an agent may decide, which is whether a pod is
// recorded for it; a record of a pod that is there is never dropped because of it.
//
// Limits: it does local file work only, for at most fileWait. It never connects to the
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
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// A pod starts and stops within 2 s, whatever the state of the runtime directory.
const (
	// lockWait is how long to wait for another process that holds the lock of the state file.
	lockWait = time.Second
	// fileWait bounds all file work of a command, that wait included: a disk may hang.
	fileWait = 1500 * time.Millisecond
)

// Plugin is the plugin with the streams of its process.
type Plugin struct {
	Stdout io.Writer // protocol: the result of ADD, nothing else
	Stderr io.Writer // the log, where the log file cannot be written
}

// Versions are the versions of the CNI specification that the plugin implements. The results of older ones have
// another format.
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
		p.within(fileWait, args, "ADD", func() { p.record(args, conf, pod, claims, result) })
	}
	if _, err := p.Stdout.Write(result); err != nil {
		return types.NewError(types.ErrIOFailure, fmt.Sprintf("writing the result: %v", err), "")
	}
	return nil
}

// within waits for file work, but not for longer than limit: the process ends then, and the work with it. A file is replaced
// as a whole or not at all.
func (p Plugin) within(limit time.Duration, args *skel.CmdArgs, command string, work func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		work()
	}()
	timeout := time.NewTimer(limit)
	defer timeout.Stop()
	select {
	case <-done:
	case <-timeout.C:
		newLogger(p.Stderr, command).Error("the runtime directory does not respond; the record of the pod is left as it is",
			"waited", limit, "containerID", args.ContainerID, "pod", parseArgs(args.Args))
	}
}

// record records the pod if one of the claims is on it, or could be. What goes wrong is logged here.
func (p Plugin) record(args *skel.CmdArgs, conf *conf, pod pod, claims []claim, result json.RawMessage) {
	log := p.logger(conf.dir, "ADD").With("containerID", args.ContainerID, "pod", pod)
	// The log is in there too.
	if err := conf.dir.MakeState(); err != nil {
		log.Error("the pod is not recorded", "error", err)
		return
	}
	agents := liveAgents(conf.dir, log)
	wanted, labels := conf.match(pod, claims, agents, log)
	if !wanted {
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
	hostInterface, hostIfIndex := interfaces.host(args.IfName, lookUp)
	attachment := runtimedir.Attachment{
		ContainerID:   args.ContainerID,
		IfName:        args.IfName,
		Network:       conf.network,
		Namespace:     pod.namespace,
		Name:          pod.name,
		UID:           pod.uid,
		Labels:        labels,
		IPs:           addrs,
		HostInterface: hostInterface,
		HostIfIndex:   hostIfIndex,
		Netns:         args.Netns,
		AddedAt:       time.Now().UTC(),
	}
	// The record of an earlier ADD of the same goes.
	if err := update(conf.dir, log, append(dead(conf.dir, agents), attachment.Key()), attachment); err != nil {
		log.Error("the pod is not recorded", "error", err)
	}
}

func (p Plugin) del(args *skel.CmdArgs) error {
	// A configuration that is not usable still names the runtime directory. The selectors do not count: they may
	// have changed since the ADD.
	conf, _, _ := parseCommon(args.StdinData)
	p.within(fileWait, args, "DEL", func() { p.forget(args, conf) })
	return nil
}

// forget removes the record of the pod, if it has one. What goes wrong is logged here.
func (p Plugin) forget(args *skel.CmdArgs, conf *conf) {
	// Without a record nothing is touched and no lock is waited for. Reading first is safe: the file is
	// replaced as a whole, a record stays in it from the end of its ADD on, and a runtime does not call DEL
	// while the ADD of the same container runs. (An ADD that outlived its runtime could come later than any
	// lock as well; the agent finds its record.)
	key := runtimedir.Key{ContainerID: args.ContainerID, IfName: args.IfName}
	recorded, err := conf.dir.Recorded(key)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !recorded {
		return
	}
	log := p.logger(conf.dir, "DEL").With("containerID", args.ContainerID, "pod", parseArgs(args.Args))
	if err := update(conf.dir, log, append(dead(conf.dir, liveAgents(conf.dir, log)), key)); err != nil {
		log.Error("the record of the pod may stay", "error", err)
	}
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
	file, err := conf.dir.ReadState()
	if err != nil {
		// Fails open: without records there is nothing to compare, and the next ADD logs the cause.
		return nil
	}
	key := runtimedir.Key{ContainerID: args.ContainerID, IfName: args.IfName}
	i := slices.IndexFunc(file.Attachments, func(a runtimedir.Attachment) bool { return a.Key() == key })
	if i < 0 {
		return nil
	}
	want, _ := interfaces.addresses(args.IfName) // ADD has logged what is ignored
	got := file.Attachments[i].IPs
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
	file, err := conf.dir.ReadState() // what is wrong with the file, the update reports
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	log := p.logger(conf.dir, "GC")
	gone := dead(conf.dir, liveAgents(conf.dir, log))
	for _, a := range file.Attachments {
		if a.Network == conf.network && !valid[a.Key()] {
			gone = append(gone, a.Key())
		}
	}
	err = update(conf.dir, log, gone)
	if errors.Is(err, runtimedir.ErrBusy) {
		return types.NewError(types.ErrTryAgainLater, err.Error(), "")
	}
	return err
}

// status fails only where ADD would: a failure makes the whole node NotReady.
func status(args *skel.CmdArgs) error {
	_, err := parseConf(args.StdinData)
	return err
}

// update changes the state file. A file that cannot be used is logged here.
func update(dir runtimedir.Dir, log *slog.Logger, gone []runtimedir.Key, add ...runtimedir.Attachment) error {
	warning, err := dir.Update(lockWait, gone, add...)
	if warning != nil {
		log.Warn("the state file was not usable", "error", warning)
	}
	return err
}

// liveAgents is what the agents that run on this node report of pods, by name. What another has reported may be out of date.
func liveAgents(dir runtimedir.Dir, log *slog.Logger) map[string]*runtimedir.Pods {
	names, err := dir.Agents()
	if err != nil {
		log.Warn("the agents cannot be listed", "error", err)
	}
	agents := map[string]*runtimedir.Pods{}
	for _, name := range names {
		agent := dir.Agent(name)
		if !agent.Live() {
			continue
		}
		pods, err := agent.ReadPods()
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has reported nothing yet
		}
		if err != nil {
			log.Warn("the file of an agent is not usable", "agent", name, "error", err)
			continue
		}
		agents[name] = pods
	}
	return agents
}

// dead are the records that agents report as dead, though no DEL came for them: where the link that leads to the sandbox is
// gone, or another has its name, so is the sandbox. An agent alone could withdraw a pod that is there.
func dead(dir runtimedir.Dir, agents map[string]*runtimedir.Pods) (keys []runtimedir.Key) {
	reported := map[runtimedir.Key]bool{}
	for _, agent := range agents {
		for _, key := range agent.Dead {
			reported[key] = true
		}
	}
	if len(reported) == 0 {
		return nil
	}
	file, _ := dir.ReadState() // what is wrong with the file, the update reports
	for _, a := range file.Attachments {
		if !reported[a.Key()] || a.HostInterface == "" {
			continue
		}
		link, exists := lookUp(a.HostInterface)
		if replaced := a.HostIfIndex != 0 && link.index != 0 && link.index != a.HostIfIndex; !exists || replaced {
			keys = append(keys, a.Key())
		}
	}
	return keys
}

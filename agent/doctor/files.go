package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/quote"
	"github.com/magic-ip-address/magic-ip-address/agent/status"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// rights comes first: what a user may not read looks as if it were not there.
func (e *examination) rights() {
	if uid := os.Geteuid(); uid != 0 {
		e.add(Hidden, "rights", fmt.Sprintf("this runs as user %d, and files and rules are root's", uid), "run this as root")
	}
}

// files looks at what is in the runtime directory.
func (e *examination) files() {
	if e.runtimeDir() {
		e.stateFile()
		e.liveAgents()
		e.pluginLog()
	}
}

// runtimeDir reports whether the directory is there.
func (e *examination) runtimeDir() bool {
	const check = "runtime directory"
	info, err := os.Stat(e.RuntimeDir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.add(Fail, check, e.RuntimeDir+" is not there", "start the agent, or say where it is: --runtime-dir. In a container it has to be mounted")
	case err != nil:
		e.add(unreadable(err), check, err.Error(), "run this as root")
	case !info.IsDir():
		e.add(Fail, check, e.RuntimeDir+" is no directory", "remove it")
	default:
		e.diskSpace()
	}
	return !errors.Is(err, fs.ErrNotExist)
}

// diskSpace sees that files can be written in the runtime directory.
func (e *examination) diskSpace() {
	const check = "runtime directory"
	const least = 1 << 20 // bytes: a few times what the files take
	var space unix.Statfs_t
	switch err := unix.Statfs(e.RuntimeDir, &space); {
	case err != nil:
		e.add(Hidden, check, err.Error(), "run this as root")
	case space.Bavail*uint64(space.Bsize) < least || space.Files > 0 && space.Ffree == 0:
		e.add(Fail, check, fmt.Sprintf("the filesystem of %s is full: pods are not recorded, and what agents report is old", e.RuntimeDir), "make room: df "+quote.Shell(e.RuntimeDir)+"; df -i "+quote.Shell(e.RuntimeDir))
	default:
		e.add(OK, check, e.RuntimeDir, "")
	}
}

// unreadable is the level of an error of reading: what may not be read is not known.
func unreadable(err error) Level {
	if errors.Is(err, fs.ErrPermission) {
		return Hidden
	}
	return Fail
}

func (e *examination) stateFile() {
	const check = "state file"
	path := runtimedir.New(e.RuntimeDir).StatePath()
	file, err := runtimedir.New(e.RuntimeDir).ReadState()
	e.records = file.Attachments
	e.stateRead = err == nil || errors.Is(err, fs.ErrNotExist)
	var newer *runtimedir.NewerVersionError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.add(OK, check, "none yet: no selected pod has been added since the node was started", "")
	case errors.As(err, &newer):
		e.add(Fail, check, err.Error(), "upgrade this agent, or replace the plugin by the one of this version")
	case errors.Is(err, fs.ErrPermission):
		e.add(Hidden, check, err.Error(), "run this as root")
	case err != nil:
		e.add(Fail, check, err.Error(), "nothing: the plugin sets it aside with the next pod. If it happens again, check the disk, and which process writes "+path)
	default:
		e.add(OK, check, fmt.Sprintf("%s, %s", path, counted(len(e.records), "record")), "")
	}
	if aside, at, ok := runtimedir.New(e.RuntimeDir).SetAside(); ok {
		e.add(Warn, check, fmt.Sprintf("a corrupt one was set aside at %s", at.Format(time.RFC3339)), "look at "+aside+", then remove it")
	}
}

func (e *examination) liveAgents() {
	const check = "agent"
	read, err := status.Read(runtimedir.New(e.RuntimeDir), e.Name)
	if err != nil {
		e.add(unreadable(err), check, err.Error(), "start it, or run this as root")
		return
	}
	e.agents = read.Agents
	if len(e.agents) == 0 {
		e.add(Fail, check, "none has ever run on this node", "start one: magic-ip-agent run")
	}
	for _, a := range e.agents {
		name := check + " " + a.Name
		switch reason := a.Unhealthy(e.now); {
		case a.Unreadable != "":
			e.add(Fail, name, reason, "upgrade this command, or restart that agent")
		case reason != "":
			e.add(Fail, name, reason, "look at its log; `kubectl get pods -o wide` in its namespace")
		default:
			e.add(OK, name, fmt.Sprintf("running since %s, polled %s ago", a.StartedAt.Format(time.RFC3339), e.now.Sub(a.Heartbeat).Round(time.Second)), "")
		}
		if a.LastError != "" {
			e.add(Fail, name, "reports: "+a.LastError, "correct that; it is retried without further action")
		}
		for _, note := range a.Notes {
			e.add(Warn, name, note, "")
		}
		e.installation(a)
	}
}

func (e *examination) installation(a status.Agent) {
	if a.Installed == nil {
		return
	}
	check := "installer " + a.Name
	if a.Installed.LastError != "" {
		e.add(Fail, check, "reports: "+a.Installed.LastError, "correct that; it is retried without further action")
	} else {
		e.add(OK, check, fmt.Sprintf("%s since %s", a.Installed.Conflist, a.Installed.InstalledAt.Format(time.RFC3339)), "")
	}
	for _, note := range a.Installed.Notes {
		e.add(Warn, check, note, "")
	}
}

// most is how many magic IPs are named one by one.
const most = 20

func (e *examination) magicIPs() {
	named, served := 0, 0
	for _, a := range e.agents {
		for _, m := range a.MagicIPs {
			check := "magic IP " + m.Frontend.String()
			if m.Reason == "" && len(m.Endpoints) > 0 {
				served++
				continue
			}
			if named++; named > most {
				continue
			}
			if m.Reason != "" {
				next := map[runtimedir.UnservedBy]string{runtimedir.ByNode: ", or the node", runtimedir.ByAgent: " of one of the two"}[m.UnservedBy]
				e.add(Fail, check, "not served by agent "+a.Name+": "+m.Reason, "change the configuration"+next)
				continue
			}
			text, next := fmt.Sprintf("has no endpoint for %s in %s (new connections: %s)", m.Selector, m.Namespace, m.Action), "look whether such a pod runs on this node"
			if len(m.Why) > 0 {
				text, next = text+": "+strings.Join(m.Why, "; "), ""
			}
			e.add(Warn, check, text, next)
		}
	}
	if named > most {
		e.add(Warn, "magic IPs", fmt.Sprintf("%d more without an endpoint, or refused", named-most), "magic-ip-agent status")
	}
	if served > 0 {
		e.add(OK, "magic IPs", counted(served, "port")+" with an endpoint", "")
	}
}

type magicIP = status.MagicIP

// logTime is how the plugin begins its lines (log/slog's text).
var logTime = regexp.MustCompile(`^time=(\S+) `)

const (
	recent    = 24 * time.Hour
	mostLines = 3
)

func (e *examination) pluginLog() {
	const check = "plugin.log"
	dir := runtimedir.New(e.RuntimeDir)
	log, err := dir.ReadLog()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.add(OK, check, "no warnings", "")
		return
	case err != nil:
		e.add(unreadable(err), check, err.Error(), "run this as root")
		return
	}
	var lines []string
	count := 0
	for line := range strings.Lines(string(log)) {
		line = strings.TrimSuffix(line, "\n")
		match := logTime.FindStringSubmatch(line)
		if match == nil {
			continue
		}
		if at, err := time.Parse(time.RFC3339Nano, match[1]); err == nil && e.now.Sub(at) < recent {
			count++
			lines = append(lines, line)
			lines = lines[max(0, len(lines)-mostLines):]
		}
	}
	if count == 0 {
		e.add(OK, check, "no warnings for a day", "")
		return
	}
	e.add(Warn, check, fmt.Sprintf("%s of the plugin within a day, the last: %s", counted(count, "warning"), strings.Join(lines, " | ")), "look at "+dir.LogPath())
}

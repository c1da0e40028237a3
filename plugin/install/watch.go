package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/plugin/conflist"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

const (
	// settle is how long to wait after the first event for more of them.
	settle = 100 * time.Millisecond
	// poll is the backstop of the watches. It reads the few files of one directory.
	poll = 10 * time.Second
	// Errors are tried again after these times.
	minRetry = time.Second
	maxRetry = time.Minute
	// standby is how often the second of two installers of one name tries the lock.
	standby = 200 * time.Millisecond
	// lastAdds is how long an ADD may take that a runtime has begun before it has read the configuration without the entry.
	lastAdds = 5 * time.Second
	// leaveTime bounds the last work after SIGTERM: kubelet kills after 30 s.
	leaveTime = 20 * time.Second
)

// Watch installs, and keeps plugin and key in place until ctx ends; both stay then. When Removed returns true, it removes
// the key, and waits for ctx to end.
func Watch(ctx context.Context, options Options) error {
	i, err := newInstaller(options)
	if err != nil {
		return err
	}
	serving, stop := context.WithCancel(ctx)
	defer stop()
	removed := make(chan bool, 1)
	go func() { // from the start, standby included
		undo := i.Removed != nil && i.Removed(serving)
		removed <- undo
		if undo {
			stop()
		}
	}()
	lock, err := i.standBy(ctx)
	if err != nil || lock == nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	i.begin(lock)
	if err := i.serve(serving); err != nil {
		return err
	}
	stop()
	if i.Removed == nil || !<-removed {
		i.Log.Info("stopped; what is installed stays in place")
		return nil
	}
	if err := i.leave(ctx); err != nil {
		return err
	}
	if err := lock.Close(); err != nil {
		return err
	}
	// A container of a DaemonSet that ends is started again, and would install again.
	i.Log.Info("uninstalled; waiting to be stopped")
	select {
	case <-ctx.Done():
	case <-time.After(lastAdds):
	}
	// A pod may have been recorded by an ADD that had begun with the entry.
	if err := removeState(i.ConfDir, runtimedir.New(i.RuntimeDir)); err != nil {
		i.Log.Warn("files of the plugin may be left in the runtime directory; they mean nothing without its entry", "error", err)
	}
	<-ctx.Done()
	return nil
}

// standBy waits until no other process installs for this agent; nil where ctx has ended before.
func (i *installer) standBy(ctx context.Context) (*runtimedir.Lock, error) {
	for first := true; ; first = false {
		lock, err := i.files.Lock()
		if err == nil {
			return lock, nil
		}
		if !errors.Is(err, runtimedir.ErrLocked) {
			return nil, err
		}
		if first {
			i.Log.Info("standing by: another process installs for this agent", "agent", i.config.Name)
		}
		select {
		case <-ctx.Done():
			return nil, nil
		case <-time.After(standby):
		}
	}
}

// serve is the loop.
func (i *installer) serve(ctx context.Context) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil { // most likely fs.inotify.max_user_instances
		i.Log.Warn("the CNI directories cannot be watched and are polled; raise fs.inotify.max_user_instances", "every", poll, "error", err)
		watcher = &fsnotify.Watcher{}
	} else {
		defer func() { _ = watcher.Close() }()
	}
	watching := err == nil
	folders := []string{i.ConfDir, i.BinDir}
	if i.ConfigFile != "" {
		folders = append(folders, filepath.Dir(i.ConfigFile)) // a ConfigMap changes by a link beside the file
	}
	// A folder that is made later is watched from the next sync on. What happened in it before is seen too, because the sync follows.
	arm := func() {
		for _, folder := range append(subfolders(i.ConfDir), folders...) {
			if watching {
				_ = watcher.Add(folder) // what is wrong with it, sync says
			}
		}
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	retry, said := minRetry, ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-watcher.Errors: // an overflow of the queue
			timer.Reset(settle)
			continue
		case event := <-watcher.Events:
			// Attempts of our own that fail are no news.
			if !conflist.IsOurs(event.Name) && (event.Op != fsnotify.Chmod || filepath.Dir(event.Name) == i.BinDir) {
				pause(ctx, watcher)
				timer.Reset(0)
			}
			continue
		case <-timer.C:
		}
		if ctx.Err() != nil {
			return nil
		}
		arm()
		for _, folder := range folders {
			if replaced(folder) {
				return fmt.Errorf("%s was removed on the node, and what is mounted here is what was there before: ending, so that a container that is started again has the new one", folder)
			}
		}
		again, err := i.look(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			if said != "" {
				i.Log.Info("recovered: plugin and entry are in place")
			}
			retry, said = minRetry, ""
			if again <= 0 {
				again = poll
			}
			timer.Reset(min(again, poll))
		default:
			waiting := errors.Is(err, errWaiting)
			if said != err.Error() && waiting {
				i.Log.Warn("the entry is not in place yet; until it is, the agent knows pods by the API only", "error", err)
			} else if said != err.Error() {
				i.Log.Error("plugin or entry cannot be put in place; tried again with growing pauses, the agent knows new pods by the API only until then", "error", err)
			}
			said = err.Error()
			timer.Reset(retry)
			if !waiting { // the directory may not even be there to be watched
				retry = min(2*retry, maxRetry)
			}
		}
	}
}

// subfolders are the folders in a directory: of the plugins of a network, or of files that links lead to.
func subfolders(path string) (folders []string) {
	entries, _ := os.ReadDir(path)
	for _, e := range entries {
		if e.IsDir() {
			folders = append(folders, filepath.Join(path, e.Name()))
		}
	}
	return folders
}

// replaced reports whether a path leads to a directory that has no name any more: a mount of one that was removed.
func replaced(path string) bool {
	var stat unix.Stat_t
	return unix.Stat(path, &stat) == nil && stat.Nlink == 0
}

// pause lets a writer finish, and takes its events together.
func pause(ctx context.Context, watcher *fsnotify.Watcher) {
	quiet := time.After(settle)
	for {
		select {
		case <-ctx.Done():
			return
		case <-quiet:
			return
		case <-watcher.Events:
		}
	}
}

// look reads the configuration and installs. With a configuration that is not valid, the last one that was counts on.
func (i *installer) look(ctx context.Context) (again time.Duration, err error) {
	config, loadErr := i.Load()
	if loadErr == nil && config.Name != i.config.Name {
		loadErr = fmt.Errorf("name: the name of a running agent cannot change from %s to %s; restart it", i.config.Name, config.Name)
	}
	if loadErr == nil {
		i.config = config
	} else {
		loadErr = fmt.Errorf("configuration, the last valid one counts on: %w", loadErr)
	}
	return i.sync(ctx, loadErr)
}

// leave removes the key, then the record of it, which the agent waits for, and then the files. What fails is tried again.
func (i *installer) leave(ctx context.Context) error {
	i.Log.Info("the DaemonSet is deleted: removing the entry", "agent", i.config.Name)
	// SIGTERM may have come already, or may come now.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTime)
	defer cancel()
	err := i.again(ctx, "the entry cannot be removed yet and is tried again; pods go on being recorded", func() error {
		return Remove(ctx, i.ConfDir, conflist.Options{}, i.RuntimeDir, i.config.Name, i.record.Conflist, i.Log)
	})
	if err != nil {
		return fmt.Errorf("the entry of agent %s is still in %s, remove it with magic-ip-agent uninstall: %w", i.config.Name, i.ConfDir, err)
	}
	dir := runtimedir.New(i.RuntimeDir)
	err = i.again(ctx, "files in the runtime directory cannot be removed yet and are tried again; they mean nothing without the entry", func() error {
		return forget(i.ConfDir, dir, i.config.Name)
	})
	if err != nil {
		err = fmt.Errorf("files stay in %s; they mean nothing without the entry, and the next installer that leaves this node removes those of the plugin: %w", dir.Path(), err)
	}
	return errors.Join(err, i.files.Leave())
}

// again repeats what fails, with growing pauses, until ctx ends.
func (i *installer) again(ctx context.Context, failed string, do func() error) error {
	for wait := standby; ; wait *= 2 {
		err := do()
		if err == nil {
			return nil
		}
		i.Log.Error(failed, "error", err)
		select {
		case <-ctx.Done():
			return err
		case <-time.After(wait):
		}
	}
}

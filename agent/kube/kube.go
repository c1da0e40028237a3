// Package kube watches the pods of this node in the Kubernetes API. It is the only importer of client-go.
//
// One list and watch per namespace, from the API server's watch cache, of the pods with spec.nodeName of
// this node, in protobuf; what nobody reads is dropped before it is kept.
package kube

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/transport"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
)

const (
	// firstAnswer is how long it may take until the first answer is missed.
	firstAnswer = 2 * time.Second
	// pollTimeout bounds the list that a poll makes while the watch is not healthy.
	pollTimeout = 3 * time.Second
	// configHash is the annotation that holds the UID by which CNI knows a static pod.
	configHash = "kubernetes.io/config.hash"
)

// Pods is the node's pods as the API tells them.
type Pods struct {
	client   kubernetes.Interface
	node     string
	requests requests

	mu    sync.Mutex
	ctx   context.Context // of Run; nil before
	wake  func()
	feeds map[string]*feed // by namespace
}

// Connect makes the client: from a kubeconfig file, or where that is empty from the pod's service account,
// whose token is read again as kubelet rotates it: every minute, and when the API server refuses it.
func Connect(kubeconfig, node string) (*Pods, error) {
	var config *rest.Config
	var err error
	if kubeconfig != "" {
		config, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	} else {
		config, err = rest.InClusterConfig()
	}
	if err != nil {
		return nil, fmt.Errorf("credentials for the Kubernetes API: %w", err)
	}
	if node == "" {
		return nil, fmt.Errorf("the name of this node is needed to ask the Kubernetes API for its pods: --node-name or NODE_NAME")
	}
	return New(config, node)
}

// New makes the client from a configuration, which it completes.
func New(config *rest.Config, node string) (*Pods, error) {
	if config.BearerTokenFile != "" {
		// Left to itself, client-go reads the file once a minute, and sends an expired token until then.
		token := transport.NewCachedFileTokenSource(config.BearerTokenFile)
		config.BearerToken, config.BearerTokenFile = "", ""
		config.Wrap(transport.ResettableTokenSourceWrapTransport(token))
	}
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return patience{next} })
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	config.UserAgent = "magic-ip-agent"
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("client for the Kubernetes API: %w", err)
	}
	return &Pods{client: client, node: node, feeds: map[string]*feed{}}, nil
}

// Run calls wake after each change of what View returns, until ctx ends.
func (p *Pods) Run(ctx context.Context, wake func()) error {
	p.mu.Lock()
	p.ctx, p.wake = ctx, wake
	for _, f := range p.feeds {
		f.start(ctx)
	}
	p.mu.Unlock()
	<-ctx.Done()
	return nil
}

// Select makes these the namespaces that are watched; inventory.AllNamespaces is every one.
func (p *Pods) Select(namespaces []string) {
	if slices.Contains(namespaces, inventory.AllNamespaces) {
		namespaces = []string{inventory.AllNamespaces}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, namespace := range namespaces {
		if p.feeds[namespace] != nil {
			continue
		}
		f := p.newFeed(namespace)
		p.feeds[namespace] = f
		if p.ctx != nil {
			f.start(p.ctx)
		}
	}
	for namespace, f := range p.feeds {
		if !slices.Contains(namespaces, namespace) {
			f.stop()
			delete(p.feeds, namespace)
		}
	}
}

// View is what the API said last.
func (p *Pods) View() inventory.View {
	p.mu.Lock()
	feeds := slices.Collect(maps.Values(p.feeds))
	p.mu.Unlock()
	view := inventory.View{Spoken: true, Reachable: true}
	for _, f := range feeds {
		pods, spoken, problem := f.view()
		view.Pods = append(view.Pods, pods...)
		view.Spoken = view.Spoken && spoken
		if spoken {
			view.Told = append(view.Told, f.namespace)
		}
		if spoken && problem == "" {
			view.Current = append(view.Current, f.namespace)
		}
		if problem != "" {
			view.Reachable = false
			if !f.fresh() {
				view.Problems = append(view.Problems, problem)
			}
		}
	}
	slices.Sort(view.Problems)
	return view
}

// fresh says that nothing has been heard because it has just been asked.
func (f *feed) fresh() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.heardAt.IsZero() && f.err == nil && time.Since(f.begunAt) < firstAnswer
}

// Poll lists where the watch is not healthy; a healthy watch costs the API server nothing. It does not wait
// for the answer, which wakes: whatever the API server does, the rest of the agent goes on.
func (p *Pods) Poll(ctx context.Context) {
	p.mu.Lock()
	feeds, wake := slices.Collect(maps.Values(p.feeds)), p.wake
	p.mu.Unlock()
	if wake == nil {
		return // nothing has been asked yet
	}
	for _, f := range feeds {
		if !f.healthy() && f.polling.CompareAndSwap(false, true) {
			go func() {
				defer f.polling.Store(false)
				f.poll(ctx)
				wake()
			}()
		}
	}
}

// feed is one namespace's list and watch.
type feed struct {
	pods      *Pods
	namespace string
	informer  cache.SharedIndexInformer
	stop      func() // does nothing before start
	polling   atomic.Bool
	begunAt   time.Time

	mu sync.Mutex
	// watching is the watch that stands; nil for none. endedAt is when the last one ended: client-go waits before it
	// begins another, for minutes where the API server asks for that.
	watching watch.Interface
	endedAt  time.Time
	// heardAt is when the watch last brought an event or a bookmark, or was begun.
	heardAt time.Time
	err     error // of the last list or watch; nil where it went well
	// polled is what a poll has listed last, when the watch was not healthy; nil where it has failed.
	polled        []inventory.Pod
	polledAt      time.Time
	polledVersion string
	// healthySince is when the watch became healthy last.
	healthySince time.Time
}

func (f *feed) options(options *metav1.ListOptions) {
	options.FieldSelector = fields.OneTermEqualSelector("spec.nodeName", f.pods.node).String()
}

func (f *feed) apiNamespace() string {
	if f.namespace == inventory.AllNamespaces {
		return metav1.NamespaceAll
	}
	return f.namespace
}

func (p *Pods) newFeed(namespace string) *feed {
	f := &feed{pods: p, namespace: namespace, stop: func() {}, begunAt: time.Now()}
	pods := f.pods.client.CoreV1().Pods(f.apiNamespace())
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			f.options(&options)
			p.requests.list.Add(1)
			list, err := pods.List(ctx, options)
			f.heard(err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			f.options(&options)
			p.requests.watch.Add(1)
			w, err := pods.Watch(ctx, options)
			if err != nil {
				f.heard(err)
				return nil, err
			}
			return f.follow(w), nil
		},
	}
	f.informer = cache.NewSharedIndexInformer(cache.ToListWatcherWithWatchListSemantics(lw, p.client), &corev1.Pod{}, 0, cache.Indexers{})
	changed := func(any) { f.pods.wake() }
	updated := func(before, now any) {
		old, okOld := before.(*corev1.Pod)
		pod, ok := now.(*corev1.Pod)
		if !okOld || !ok || !reflect.DeepEqual(convert(old), convert(pod)) {
			f.pods.wake()
		}
	}
	// These fail only for an informer that runs already.
	_ = f.informer.SetTransform(trim)
	_, _ = f.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: changed, DeleteFunc: changed, UpdateFunc: updated,
	})
	return f
}

func (f *feed) start(ctx context.Context) {
	ctx, f.stop = context.WithCancel(ctx)
	go f.informer.RunWithContext(ctx)
	go func() {
		if cache.WaitForCacheSync(ctx.Done(), f.informer.HasSynced) {
			f.pods.wake() // a namespace without pods has spoken too
		}
	}()
}

// follow passes on what a watch brings, and notes when it is heard of and when it ends.
func (f *feed) follow(w watch.Interface) watch.Interface {
	events := make(chan watch.Event)
	followed := watch.NewProxyWatcher(events)
	f.mu.Lock()
	f.watching = followed
	f.mu.Unlock()
	f.heard(nil)
	go func() {
		defer func() {
			w.Stop()
			f.mu.Lock()
			if f.watching == followed {
				f.watching, f.endedAt = nil, time.Now()
			}
			f.mu.Unlock()
			close(events)
		}()
		for {
			select {
			case <-followed.StopChan():
				return
			case event, open := <-w.ResultChan():
				if !open {
					return
				}
				if event.Type == watch.Error {
					f.heard(apierrors.FromObject(event.Object))
				} else {
					f.heard(nil)
				}
				select {
				case <-followed.StopChan():
					return
				case events <- event:
				}
			}
		}
	}()
	return followed
}

// heard notes that the API server has answered, or has failed to.
func (f *feed) heard(err error) {
	f.mu.Lock()
	recovered := err == nil && f.err != nil
	failed := err != nil && f.err == nil
	healthy := f.healthyLocked()
	f.err = err
	if err == nil {
		f.heardAt = time.Now()
		if f.endedAt.IsZero() {
			f.endedAt = f.heardAt // a list has been answered, and no watch was ever begun
		}
	}
	if !healthy && f.healthyLocked() {
		f.healthySince = time.Now()
	}
	f.mu.Unlock()
	if recovered || failed {
		f.pods.wake()
	}
}

func (f *feed) healthy() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.healthyLocked()
}

func (f *feed) healthyLocked() bool {
	return f.err == nil && f.watching != nil && time.Since(f.heardAt) < watchSilence
}

// polledCounts says whether a poll knows more than the watch. A watch that begins anew answers before it has told
// everything: what it told last, before it broke, must not come back meanwhile.
func (f *feed) polledCounts() bool {
	order, err := resourceversion.CompareResourceVersion(f.informer.LastSyncResourceVersion(), f.polledVersion)
	switch {
	case f.polled == nil, err == nil && order >= 0:
		return false
	case !f.healthyLocked(), !f.informer.HasSynced():
		return true
	}
	// Versions that went back are those of an etcd that was restored.
	return err == nil && time.Since(f.healthySince) < pollTimeout
}

func (f *feed) view() (pods []inventory.Pod, spoken bool, problem string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.polledCounts() {
		pods, spoken = f.polled, true
	} else {
		pods, spoken = f.watched(), f.informer.HasSynced()
	}
	if f.polled != nil && !f.polledAt.Before(f.heardAt) {
		return pods, spoken, ""
	}
	switch {
	case apierrors.IsForbidden(f.err):
		problem = fmt.Sprintf("the API server refuses pods of namespace %s: allow get, list and watch of pods there: %v", f.namespace, f.err)
	case f.err != nil:
		problem = fmt.Sprintf("pods of namespace %s: %v", f.namespace, f.err)
	case f.heardAt.IsZero():
		problem = fmt.Sprintf("pods of namespace %s: the API server has not answered yet", f.namespace)
	case f.watching == nil && time.Since(f.endedAt) > pollTimeout: // one watch ends every few minutes, and another begins
		problem = fmt.Sprintf("pods of namespace %s: the watch ended %s ago, and no other has begun", f.namespace, time.Since(f.endedAt).Round(time.Second))
	case f.watching != nil && !f.healthyLocked():
		problem = fmt.Sprintf("pods of namespace %s: the watch has been silent for %s", f.namespace, time.Since(f.heardAt).Round(time.Second))
	}
	return pods, spoken, problem
}

// watched is what the watch has told.
func (f *feed) watched() (pods []inventory.Pod) {
	for _, object := range f.informer.GetStore().List() {
		if pod, ok := object.(*corev1.Pod); ok {
			pods = append(pods, convert(pod))
		}
	}
	return pods
}

func (f *feed) poll(ctx context.Context) {
	begun := time.Now()
	ctx, cancel := context.WithTimeout(context.WithValue(ctx, isPoll{}, true), pollTimeout)
	defer cancel()
	options := metav1.ListOptions{ResourceVersion: "0"} // from the watch cache
	f.options(&options)
	f.pods.requests.poll.Add(1)
	list, err := f.pods.client.CoreV1().Pods(f.apiNamespace()).List(ctx, options)
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("the API server has not answered within %s", pollTimeout)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil {
		if f.heardAt.Before(begun) { // and the watch has not answered meanwhile
			f.err, f.polled = err, nil
		}
		return
	}
	f.polled, f.polledAt, f.polledVersion = []inventory.Pod{}, time.Now(), list.ResourceVersion
	for i := range list.Items {
		f.polled = append(f.polled, convert(&list.Items[i]))
	}
}

// isPoll marks the context of a poll.
type isPoll struct{}

// patience does not let client-go wait where the API server asks a poll to come later (429, 503): the next poll does,
// and what the API server has said is told.
type patience struct{ http.RoundTripper }

func (p patience) RoundTrip(request *http.Request) (*http.Response, error) {
	response, err := p.RoundTripper.RoundTrip(request)
	if err == nil && request.Context().Value(isPoll{}) != nil {
		response.Header.Del("Retry-After")
	}
	return response, err
}

// WrappedRoundTripper is how client-go finds what is beneath.
func (p patience) WrappedRoundTripper() http.RoundTripper { return p.RoundTripper }

// trim drops what convert does not read.
func trim(object any) (any, error) {
	pod, ok := object.(*corev1.Pod)
	if !ok {
		return object, nil
	}
	kept := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, ResourceVersion: pod.ResourceVersion, Labels: pod.Labels,
			CreationTimestamp: pod.CreationTimestamp, DeletionTimestamp: pod.DeletionTimestamp, OwnerReferences: pod.OwnerReferences,
		},
		Status: corev1.PodStatus{Phase: pod.Status.Phase, PodIPs: pod.Status.PodIPs},
	}
	if hash := pod.Annotations[configHash]; hash != "" {
		kept.Annotations = map[string]string{configHash: hash}
	}
	for _, condition := range pod.Status.Conditions {
		if condition.Type == corev1.PodReady {
			kept.Status.Conditions = []corev1.PodCondition{{Type: condition.Type, Status: condition.Status}}
		}
	}
	for _, c := range pod.Spec.Containers {
		kept.Spec.Containers = append(kept.Spec.Containers, corev1.Container{Ports: c.Ports})
	}
	for _, c := range pod.Spec.InitContainers {
		kept.Spec.InitContainers = append(kept.Spec.InitContainers, corev1.Container{Ports: c.Ports, RestartPolicy: c.RestartPolicy})
	}
	return kept, nil
}

func convert(pod *corev1.Pod) inventory.Pod {
	p := inventory.Pod{
		Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID), ConfigHash: pod.Annotations[configHash], Labels: pod.Labels,
		CreatedAt:   pod.CreationTimestamp.Time,
		Running:     pod.Status.Phase == corev1.PodRunning,
		Finished:    pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed,
		Terminating: pod.DeletionTimestamp != nil,
		Ports:       map[string]uint16{},
	}
	if owner := metav1.GetControllerOfNoCopy(pod); owner != nil {
		p.Owner = owner.Kind + "/" + owner.Name
	}
	for _, ip := range pod.Status.PodIPs {
		if address, err := netip.ParseAddr(ip.IP); err == nil {
			p.IPs = append(p.IPs, address)
		}
	}
	for _, condition := range pod.Status.Conditions {
		if condition.Type == corev1.PodReady {
			p.Ready = condition.Status == corev1.ConditionTrue
		}
	}
	named := func(containers []corev1.Container, counts func(corev1.Container) bool) {
		for _, c := range containers {
			for _, port := range c.Ports {
				if _, taken := p.Ports[port.Name]; port.Name != "" && !taken && counts(c) {
					p.Ports[port.Name] = uint16(port.ContainerPort)
				}
			}
		}
	}
	named(pod.Spec.Containers, func(corev1.Container) bool { return true })
	named(pod.Spec.InitContainers, func(c corev1.Container) bool { // native sidecars
		return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
	})
	return p
}

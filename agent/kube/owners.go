package kube

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/metadata"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
)

const (
	// ownerInterval is how often the UID of an owner is read again, and up to half as long again: it may have been replaced.
	ownerInterval = 5 * time.Minute
	// ownerTimeout bounds one request.
	ownerTimeout = 5 * time.Second
	// A request that failed is repeated after these times, and up to half as long again.
	minOwnerPause = 2 * time.Second
	maxOwnerPause = time.Minute
	// maxCompared bounds what is remembered of UIDs that pods invented.
	maxCompared = 1000
)

// owners knows which live object controls a pod. The author of a pod writes its ownerReferences, and the API server checks
// neither kind nor UID: only the UID of the object that exists counts.
//
// Objects are read when a pod names a UID that is not known, and not watched: the status of a DaemonSet changes with each of
// its pods, and each change would go to every node.
type owners struct {
	client   metadata.Interface
	requests atomic.Uint64

	mu       sync.Mutex
	ctx      context.Context // nil before start
	answered func()
	seen     map[ownerObject]*ownerState
}

// ownerObject is an object by its name.
type ownerObject struct {
	schema.GroupVersionResource
	namespace, name string
}

// ownerState is what is known of one.
type ownerState struct {
	uid        types.UID // of the live object; empty where there is none
	controller types.UID // of that
	// compared are the UIDs that an answer is newer than; waiting those that no answer is.
	compared, waiting map[types.UID]bool
	err               error // of the last request
	asking            bool
	again             time.Time     // when to ask again
	pause             time.Duration // that the last failure made
	used              time.Time
}

func newOwners(client metadata.Interface) *owners {
	return &owners{client: client, seen: map[ownerObject]*ownerState{}}
}

// start allows requests, until ctx ends; answered is called after each.
func (o *owners) start(ctx context.Context, answered func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ctx, o.answered = ctx, answered
}

// of returns which of the wanted owners the pod has, and of which it is not known yet.
func (o *owners) of(pod *corev1.Pod, wanted []inventory.OwnerQuery) (owns []string, unresolved []inventory.OwnerQuery) {
	controller := metav1.GetControllerOfNoCopy(pod)
	if controller == nil {
		return nil, nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, want := range wanted {
		if want.Namespace != inventory.AllNamespaces && want.Namespace != pod.Namespace {
			continue
		}
		is, known := o.controls(want.Owner, pod.Namespace, controller)
		if text := want.String(); is && !slices.Contains(owns, text) {
			owns = append(owns, text)
		}
		if !known {
			unresolved = append(unresolved, want)
		}
	}
	return owns, unresolved
}

// controls reports whether owner is the object that a pod's controller reference names, itself or by a ReplicaSet.
func (o *owners) controls(owner inventory.Owner, namespace string, reference *metav1.OwnerReference) (is, known bool) {
	group, err := schema.ParseGroupVersion(reference.APIVersion)
	if err != nil {
		return false, true
	}
	named := inventory.Owner{Group: group.Group, Version: owner.Version, Kind: reference.Kind, Name: reference.Name}
	if named == owner {
		state := o.state(owner, namespace)
		return o.compare(state, reference.UID)
	}
	if owner.Group != "apps" || owner.Kind != "Deployment" || group.Group != "apps" || reference.Kind != "ReplicaSet" {
		return false, true
	}
	set := o.state(inventory.Owner{Group: "apps", Version: "v1", Kind: "ReplicaSet", Name: reference.Name}, namespace)
	if is, known = o.compare(set, reference.UID); !is {
		return is, known
	}
	return o.compare(o.state(owner, namespace), set.controller)
}

func (o *owners) state(owner inventory.Owner, namespace string) *ownerState {
	resource, _ := meta.UnsafeGuessKindToResource(schema.GroupVersionKind{Group: owner.Group, Version: owner.Version, Kind: owner.Kind})
	object := ownerObject{resource, namespace, owner.Name}
	state := o.seen[object]
	if state == nil {
		state = &ownerState{compared: map[types.UID]bool{}, waiting: map[types.UID]bool{}}
		o.seen[object] = state
	}
	state.used = time.Now()
	return state
}

// compare reports whether uid is that of the live object. What is not known is asked for.
func (o *owners) compare(state *ownerState, uid types.UID) (is, known bool) {
	switch {
	case uid == "":
		return false, true
	case state.uid == uid:
		return true, true
	case state.compared[uid]:
		return false, true
	case !state.waiting[uid]:
		state.waiting[uid] = true
		if state.err == nil {
			state.again = time.Time{} // now
		}
	}
	return false, false
}

// ask reads the objects that are due.
func (o *owners) ask() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ctx == nil {
		return
	}
	for object, state := range o.seen {
		switch {
		case time.Since(state.used) > 2*ownerInterval:
			delete(o.seen, object)
		case !state.asking && !time.Now().Before(state.again):
			state.asking = true
			go o.read(o.ctx, object, state)
		}
	}
}

func (o *owners) read(ctx context.Context, object ownerObject, state *ownerState) {
	o.mu.Lock()
	asked := make([]types.UID, 0, len(state.waiting))
	for uid := range state.waiting {
		asked = append(asked, uid)
	}
	o.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, ownerTimeout)
	defer cancel()
	o.requests.Add(1)
	live, err := o.client.Resource(object.GroupVersionResource).Namespace(object.namespace).Get(ctx, object.name, metav1.GetOptions{})

	gone := notFound(err, object.Resource, object.name)
	o.mu.Lock()
	state.asking = false
	if err != nil && !gone {
		state.err = err
		state.pause = min(max(2*state.pause, minOwnerPause), maxOwnerPause)
		state.again = time.Now().Add(state.pause/2 + rand.N(state.pause))
	} else {
		state.answer(live, asked)
	}
	o.mu.Unlock()
	o.answered()
}

// answer takes in the live object, nil where there is none.
func (s *ownerState) answer(live *metav1.PartialObjectMetadata, asked []types.UID) {
	s.uid, s.controller, s.err, s.pause = "", "", nil, 0
	s.again = time.Now().Add(ownerInterval + rand.N(ownerInterval/2))
	if live != nil {
		s.uid = live.UID
		if controller := metav1.GetControllerOfNoCopy(live); controller != nil {
			s.controller = controller.UID
		}
	}
	if len(s.compared) > maxCompared {
		clear(s.compared)
	}
	for _, uid := range asked {
		delete(s.waiting, uid)
		s.compared[uid] = true
	}
}

// problems are why owners cannot be read, one sentence each.
func (o *owners) problems() (problems []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for object, state := range o.seen {
		switch {
		case apierrors.IsForbidden(state.err):
			problems = append(problems, fmt.Sprintf("the API server does not allow %s %s of namespace %s, so that it is not known whether pods are owned by it; allow get of %s there: %v",
				object.Resource, object.name, object.namespace, object.GroupResource(), state.err))
		case state.err != nil:
			problems = append(problems, fmt.Sprintf("%s %s of namespace %s: %v", object.Resource, object.name, object.namespace, state.err))
		}
	}
	return problems
}

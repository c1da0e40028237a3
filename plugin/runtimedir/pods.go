package runtimedir

import (
	"maps"
	"slices"
)

// Bounds of what is kept of pods. A pod can bear 0.7 MB of labels; a label that a selector can name has at most 317
// bytes of key and 63 of value.
const (
	// MaxLabels and MaxLabelBytes bound the labels that are kept of one pod.
	MaxLabels     = 64
	MaxLabelBytes = 8 << 10
	// maxPodsBytes bounds the labels of all pods in one pods.json, and maxDead its list of records.
	maxPodsBytes = 512 << 10
	maxDead      = 4096
	podsLimit    = 2 << 20
)

// Pods is what the CNI plugin may learn from an agent: pods.json.
type Pods struct {
	Version int `json:"version"`
	// Labels of the node's pods in the namespaces that the agent serves, by pod UID: only keys that selectors use,
	// see KeepLabels. A pod that is missing is not known.
	Labels map[string]map[string]string `json:"labels,omitempty"`
	// Dead are the records whose pod the API no longer has and whose host interface is gone: the plugin drops them.
	Dead []Key `json:"dead,omitempty"`
}

func (p *Pods) version() *int { return &p.Version }

// KeepLabels returns the labels of a pod with one of the keys: nil (not known) where labels are nil, or exceed the bounds.
func KeepLabels(labels map[string]string, keys map[string]bool) map[string]string {
	if labels == nil {
		return nil
	}
	kept := map[string]string{}
	for key := range keys {
		if value, ok := labels[key]; ok {
			kept[key] = value
		}
	}
	if size(kept) > MaxLabelBytes || len(kept) > MaxLabels {
		return nil
	}
	return kept
}

func size(labels map[string]string) (bytes int) {
	for key, value := range labels {
		bytes += len(key) + len(value)
	}
	return bytes
}

// bound drops what exceeds the bounds, and returns the number of pods whose labels are dropped.
func (p *Pods) bound() (dropped int) {
	total := 0
	kept := make(map[string]map[string]string, len(p.Labels))
	for _, uid := range slices.Sorted(maps.Keys(p.Labels)) {
		labels := p.Labels[uid]
		bytes := size(labels)
		needed := bytes + len(uid) + 16*len(labels) + 16 // with what JSON adds
		if bytes > MaxLabelBytes || len(labels) > MaxLabels || total+needed > maxPodsBytes {
			dropped++
			continue
		}
		kept[uid] = labels
		total += needed
	}
	if p.Labels != nil {
		p.Labels = kept
	}
	p.Dead = p.Dead[:min(len(p.Dead), maxDead)]
	return dropped
}

// ReadPods returns what the agent says of pods, within the bounds; fs.ErrNotExist where it has said nothing.
func (a Agent) ReadPods() (*Pods, error) {
	pods := &Pods{}
	if a.isOld() {
		old, err := a.readOld()
		if err != nil {
			return nil, err
		}
		pods = old.pods()
	} else if err := a.read(podsFile, podsLimit, pods); err != nil {
		return nil, err
	}
	pods.bound()
	return pods, nil
}

// WritePods replaces what the plugin may learn. Labels of pods that exceed the bounds are dropped: these pods are recorded
// whatever their labels are. dropped is their number.
func (a Agent) WritePods(pods Pods) (dropped int, err error) {
	dropped = pods.bound()
	return dropped, a.write(podsFile, podsLimit, &pods)
}

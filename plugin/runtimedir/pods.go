package runtimedir

import "slices"

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
	// Labels of the node's pods in the namespaces that the agent serves, in order of UID: only keys that its selectors use,
	// see KeepLabels. A pod that is missing is not known.
	Labels []PodLabels `json:"labels,omitempty"`
	// Dead are the records whose pod the API no longer has and whose host interface is gone: the plugin drops them.
	Dead []Key `json:"dead,omitempty"`
}

// PodLabels are labels of a pod under the ID that CNI has of it.
type PodLabels struct {
	PodID
	Labels map[string]string `json:"labels"`
}

func (p *Pods) version() *int { return &p.Version }

// LabelsOf returns the labels of a pod; nil where they are not known.
func (p *Pods) LabelsOf(id PodID) map[string]string {
	for _, l := range p.Labels {
		if l.PodID == id || l.PodID == (PodID{UID: id.UID}) {
			return l.Labels
		}
	}
	return nil
}

// SelectLabels returns the labels of a pod with one of the keys: nil (not known) where labels are nil.
func SelectLabels(labels map[string]string, keys map[string]bool) map[string]string {
	if labels == nil {
		return nil
	}
	kept := map[string]string{}
	for key := range keys {
		if value, ok := labels[key]; ok {
			kept[key] = value
		}
	}
	return kept
}

// KeepLabels is SelectLabels for what is written to a file: nil (not known) also where the labels exceed the bounds.
func KeepLabels(labels map[string]string, keys map[string]bool) map[string]string {
	kept := SelectLabels(labels, keys)
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
	p.Labels = slices.DeleteFunc(slices.Clone(p.Labels), func(l PodLabels) bool {
		bytes := size(l.Labels)
		needed := bytes + len(l.Namespace) + len(l.Name) + len(l.UID) + 16*len(l.Labels) + 64 // with what JSON adds
		if bytes > MaxLabelBytes || len(l.Labels) > MaxLabels || total+needed > maxPodsBytes {
			dropped++
			return true
		}
		total += needed
		return false
	})
	p.Dead = p.Dead[:min(len(p.Dead), maxDead)]
	return dropped
}

// ReadPods returns what the agent reports of pods, within the bounds; fs.ErrNotExist where it has reported nothing.
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

package kube

import (
	"context"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/magic-ip-address/magic-ip-address/agent/event"
)

// component is who reports the Events.
const component = "magic-ip-agent"

// mostMessage is the longest message that the API takes (core/v1 Event, in bytes).
const mostMessage = 1024

// Self is the agent's own pod, which its Events are about.
type Self struct{ Namespace, Name, UID string }

// Known says whether all of it is known.
func (s Self) Known() bool { return s.Namespace != "" && s.Name != "" && s.UID != "" }

// Events sends Events about a pod. It only ever creates them.
func (p *Pods) Events(self Self) event.Sender {
	return func(ctx context.Context, e event.Event) error {
		_, err := p.client.CoreV1().Events(self.Namespace).Create(ctx, object(self, p.node, e), metav1.CreateOptions{})
		if apierrors.IsForbidden(err) {
			return fmt.Errorf("the API server refuses Events in namespace %s: allow create of events there: %w", self.Namespace, err)
		}
		return err
	}
}

func object(self Self, node string, e event.Event) *corev1.Event {
	kind := corev1.EventTypeNormal
	if e.Warning {
		kind = corev1.EventTypeWarning
	}
	message := e.Message
	if len(message) > mostMessage {
		message = strings.ToValidUTF8(message[:mostMessage-3], "") + "..."
	}
	return &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: self.Namespace,
			Name:      fmt.Sprintf("%.200s.%x", self.Name, time.Now().UnixNano()), // as others name them
		},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: "v1", Kind: "Pod", Namespace: self.Namespace, Name: self.Name, UID: types.UID(self.UID),
		},
		Type: kind, Reason: e.Reason, Message: message, Count: int32(e.Count),
		FirstTimestamp: metav1.NewTime(e.First), LastTimestamp: metav1.NewTime(e.Last),
		Source: corev1.EventSource{Component: component, Host: node}, ReportingController: component, ReportingInstance: self.Name,
	}
}

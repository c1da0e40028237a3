//go:build clients

package clients_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/examples"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// way is how applications reach a target.
type way string

const (
	byMagicIP way = "magic IP"
	// holding is a magic IP too, of a release of the tests: connections wait while there is no target.
	holding   way = "hold"
	byService way = "Service"
)

// address is where a way leads to the target of an example.
func (w world) address(e examples.Example, by way) string {
	w.Helper()
	switch by {
	case holding:
		return holdingAddress(e)
	case byService:
		made, err := cluster.Admin.CoreV1().Services(e.Namespace).Get(w.Context(), serviceName(e), metav1.GetOptions{})
		w.must(err)
		return made.Spec.ClusterIP
	}
	return e.Address.String()
}

// load is an application that sends to the target of an example.
type load struct {
	name    string // in the table
	example string
	send    string // what the program is asked to send
	// settings are set besides the example's; ADDRESS is replaced.
	settings map[string]string
	// retries says that the client sends again what was not taken, or asks another server.
	retries bool
	// underWay is how many answers may be under way when the flow of their datagrams moves to another pod: they are lost.
	underWay int
	// waits says that it is measured too where connections wait for a target.
	waits bool
}

// ways are those by which a load is measured side by side.
func (l load) ways() []way {
	if l.waits {
		return []way{byMagicIP, holding, byService}
	}
	return []way{byMagicIP, byService}
}

// loads are applications with the SDKs' defaults, but that OpenTelemetry's batches go every half second instead of every five,
// so that each update meets some, and are given up after a minute instead of ten seconds, so that a busy machine decides nothing.
func loads() []load {
	http := map[string]string{"OTEL_BSP_SCHEDULE_DELAY": "500", "OTEL_EXPORTER_OTLP_TIMEOUT": "60000"}
	grpc := map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://ADDRESS:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
	maps.Copy(grpc, http)
	return []load{
		{name: "OpenTelemetry SDK, OTLP gRPC", example: "opentelemetry", send: "otlp", settings: grpc, retries: true},
		{name: "OpenTelemetry SDK, OTLP HTTP", example: "opentelemetry", send: "otlp", settings: http, waits: true},
		{name: "Zipkin reporter", example: "zipkin", send: "zipkin", retries: true},
		{name: "statsd, UDP", example: "statsd", send: "statsd"},
		{name: "Datadog client, DogStatsD, UDP", example: "datadog", send: "dogstatsd"},
		{name: "Datadog tracer", example: "datadog", send: "datadog-traces", waits: true},
		{name: "Datadog tracer, retries set", example: "datadog", send: "datadog-traces-retry", retries: true},
		{name: "Elastic APM agent", example: "elastic-apm", send: "elastic", settings: map[string]string{"ELASTIC_APM_LOG_FILE": "stderr"}, waits: true},
		{name: "Go's resolver", example: "dns-cache", send: "dns-go", retries: true},
		{name: "glibc's resolver", example: "dns-cache", send: "dns-glibc", retries: true},
		{name: "UDP, 1,600 bytes by EDNS, asked once", example: "dns-cache", send: "dns-udp", underWay: 5},
		{name: "TCP, asked once", example: "dns-cache", send: "dns-tcp"},
	}
}

// outcome is what became of what one application has sent by one way during one update.
type outcome struct {
	load  load
	by    way
	how   strategy
	sent  int
	lost  int
	twice int // received more than once
	said  string
}

// closed reports whether all that the SDK says is that the server has closed a connection. Go's HTTP client does not send a POST
// again where that happens just before it: a server that ends can cost a batch, whatever leads to it.
func (o outcome) closed() bool {
	for line := range strings.Lines(o.said) {
		if !strings.Contains(line, "EOF") && !strings.Contains(line, "connection reset by peer") {
			return false
		}
	}
	return o.said != ""
}

// TestLosses updates the target of each example under applications that reach it by the magic IP of the example, and beside
// them by a Service with internalTrafficPolicy: Local. It counts what the server has received.
//
// By the magic IP nothing is lost where the client retries or the server drains, but for a request that meets the end of its
// connection, and an answer that is under way when its flow moves. All else is reported.
func TestLosses(t *testing.T) {
	var mu sync.Mutex
	var outcomes []outcome
	t.Run("servers", func(t *testing.T) {
		for _, s := range servers() {
			if !slices.ContainsFunc(loads(), func(l load) bool { return l.example == s.example }) {
				continue
			}
			t.Run(s.example, func(t *testing.T) {
				// One after the other, and not in parallel: what is lost grows with the time that a new pod needs.
				w := world{t}
				w.placeService(s)
				for _, how := range []strategy{rolling, surging} {
					these := w.updated(s, how)
					mu.Lock()
					outcomes = append(outcomes, these...)
					mu.Unlock()
				}
			})
		}
	})
	report(t, outcomes)
	for _, o := range outcomes {
		if o.by == byMagicIP && o.lost > o.load.underWay && (o.load.retries || o.how == surging && !o.closed()) {
			t.Errorf("%s, %s: %d of %d lost by the magic IP", o.load.name, o.how, o.lost, o.sent)
		}
	}
}

// placeService makes the Service beside the magic IP, and the settings that lead elsewhere than the example's.
func (w world) placeService(s server) {
	w.Helper()
	e := all[s.example]
	_, err := cluster.Admin.CoreV1().Services(e.Namespace).Create(w.Context(), service(e), metav1.CreateOptions{})
	w.must(err)
	for _, by := range []way{holding, byService} {
		settings := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: settingsName(e, by)}, Data: map[string]string{}}
		for key, value := range e.Settings {
			settings.Data[key] = strings.ReplaceAll(value, e.Address.String(), w.address(e, by))
		}
		_, err = cluster.Admin.CoreV1().ConfigMaps(applicationsNamespace).Create(w.Context(), settings, metav1.CreateOptions{})
		w.must(err)
	}
}

// settingsName is that of the ConfigMap of an example, or of the tests.
func settingsName(e examples.Example, by way) string {
	if by == byMagicIP {
		return e.Name + "-client"
	}
	return e.Name + "-" + short(string(by))
}

// updated is one update of a server under load.
func (w world) updated(s server, how strategy) (outcomes []outcome) {
	w.Helper()
	pod := w.place(s, how)
	var applications []application
	for i, l := range loads() {
		if l.example == s.example {
			for _, by := range l.ways() {
				applications = append(applications, application{l, by, fmt.Sprintf("%s-%d-%s-%s", l.send, i, short(string(how)), short(string(by)))})
			}
		}
	}
	for _, a := range applications {
		w.start(a)
	}
	for _, a := range applications {
		w.arrives(a)
	}
	time.Sleep(warmUp)
	w.replace(s, pod)
	time.Sleep(afterwards)
	for _, a := range applications {
		w.stop(a)
	}
	for _, a := range applications {
		outcomes = append(outcomes, outcome{load: a.load, by: a.by, how: how, sent: w.sent(a)})
	}
	w.allArrived(applications, outcomes)
	for i, a := range applications {
		o := &outcomes[i]
		arrived, err := a.arrived()
		w.must(err)
		o.lost = o.sent - len(arrived)
		for _, times := range arrived {
			if times > 1 {
				o.twice++
			}
		}
		w.Logf("%s, %s, by %s: %d sent, %d lost, %d received twice", a.load.name, how, a.by, o.sent, o.lost, o.twice)
		if o.lost > 0 {
			said, err := os.ReadFile(filepath.Join(node.Path(journals), a.name+".log"))
			w.must(err)
			o.said = string(said)
			w.Logf("lost are the numbers %s; the end of what the SDK says:\n%s", missing(a, o.sent, arrived), said[max(0, len(said)-1500):])
		}
	}
	return outcomes
}

const (
	// warmUp is for how long applications send before an update, and afterwards for how long after it.
	warmUp, afterwards = 2 * time.Second, 3 * time.Second
	// late is how long what was sent last may take to the journal.
	late = 5 * time.Second
)

// short is the first word, in lower case.
func short(text string) string {
	word, _, _ := strings.Cut(strings.ToLower(text), " ")
	return word
}

// application is a load that runs: a pod of that name.
type application struct {
	load load
	by   way
	name string
}

func (w world) start(a application) {
	w.Helper()
	grace := int64(90)
	container := corev1.Container{
		Name: "app", Image: imageApp, ImagePullPolicy: corev1.PullNever, Args: []string{"--send", a.load.send, "--name", a.name, "--journals", journals},
	}
	e := all[a.load.example]
	address := w.address(e, a.by)
	for key, value := range a.load.settings {
		container.Env = append(container.Env, corev1.EnvVar{Name: key, Value: strings.ReplaceAll(value, "ADDRESS", address)})
	}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: a.name},
		Spec: corev1.PodSpec{
			RestartPolicy: corev1.RestartPolicyNever, TerminationGracePeriodSeconds: &grace, DNSPolicy: corev1.DNSDefault, Containers: []corev1.Container{container},
		},
	}
	if e.DNS != nil {
		pod.Spec.DNSPolicy, pod.Spec.DNSConfig = corev1.DNSNone, e.DNS.DeepCopy()
		pod.Spec.DNSConfig.Nameservers[0] = address
		pod.Spec.Containers[0].Args = append(pod.Spec.Containers[0].Args, "--every", "50ms")
	} else {
		pod.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: settingsName(e, a.by)}}}}
	}
	journalsVolume(&pod.Spec)
	_, err := cluster.Admin.CoreV1().Pods(applicationsNamespace).Create(w.Context(), pod, metav1.CreateOptions{})
	w.must(err)
}

// arrives waits for the first that the server has received of an application.
func (w world) arrives(a application) {
	w.Helper()
	w.eventually("the first that arrives of "+a.name, func() error {
		if arrived, err := a.arrived(); err != nil || len(arrived) > 0 {
			return err
		}
		return errors.New("nothing has arrived")
	})
}

// stop tells an application to end.
func (w world) stop(a application) {
	w.Helper()
	w.must(cluster.Admin.CoreV1().Pods(applicationsNamespace).Delete(w.Context(), a.name, metav1.DeleteOptions{}))
}

// sent is how much an application has sent that was told to end.
func (w world) sent(a application) (sent int) {
	w.Helper()
	w.eventually("the end of "+a.name, func() error {
		data, err := os.ReadFile(filepath.Join(node.Path(journals), a.name+".sent"))
		if err == nil {
			sent, err = strconv.Atoi(strings.TrimSpace(string(data)))
		}
		return err
	})
	w.eventually("the end of pod "+a.name, func() error {
		_, err := cluster.Admin.CoreV1().Pods(applicationsNamespace).Get(w.Context(), a.name, metav1.GetOptions{})
		if !apierrors.IsNotFound(err) {
			return fmt.Errorf("the pod is still there: %w", err)
		}
		return nil
	})
	return sent
}

// missing are the numbers of what has not arrived, from the first to the last of each gap.
func missing(a application, sent int, arrived map[string]int) string {
	var gaps []string
	for number := 0; number < sent; number++ {
		first := number
		for number < sent && arrived[a.item(number)] == 0 {
			number++
		}
		if number > first {
			gaps = append(gaps, fmt.Sprintf("%d-%d", first, number-1))
		}
	}
	return strings.Join(gaps, ", ")
}

// item is the name of an item of an application, as package journal gives it.
func (a application) item(number int) string { return fmt.Sprintf("load.%s.%d", a.name, number) }

// allArrived waits until all has arrived that was sent, or nothing more does.
func (w world) allArrived(applications []application, sent []outcome) {
	w.Helper()
	ctx, cancel := lab.Patience(w.Context(), late)
	defer cancel()
	_ = lab.Eventually(ctx, func() error { // what is missing then is lost
		for i, a := range applications {
			if arrived, err := a.arrived(); err != nil || len(arrived) < sent[i].sent {
				return errors.Join(err, fmt.Errorf("%d of %d have arrived", len(arrived), sent[i].sent))
			}
		}
		return nil
	})
}

// arrived is what the journals have of an application, and how often.
func (a application) arrived() (map[string]int, error) {
	arrived := map[string]int{}
	files, err := filepath.Glob(filepath.Join(node.Path(journals), "*"))
	for _, file := range files {
		if ext := filepath.Ext(file); ext == ".sent" || ext == ".log" {
			continue
		}
		data, errRead := os.ReadFile(file)
		err = errors.Join(err, errRead)
		for line := range bytes.Lines(data) {
			if name := string(bytes.TrimSpace(line)); strings.HasPrefix(name, "load."+a.name+".") {
				arrived[name]++
			}
		}
	}
	return arrived, err
}

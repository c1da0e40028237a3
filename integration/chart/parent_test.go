package chart

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
)

// TestParent: a parent chart holds this one twice, under its name and under an alias, and a third time switched off by a condition.
func TestParent(t *testing.T) {
	ours, err := loader.Load(chartDir)
	if err != nil {
		t.Fatal(err)
	}
	parent := &chart.Chart{Metadata: &chart.Metadata{APIVersion: "v2", Name: "parent", Version: "1.0.0"}}
	parent.SetDependencies(ours)
	for _, alias := range []string{"", "Stats_D", "disabled"} {
		name := alias
		if name == "" {
			name = ours.Name()
		}
		parent.Metadata.Dependencies = append(parent.Metadata.Dependencies, &chart.Dependency{
			Name: ours.Name(), Version: ours.Metadata.Version, Alias: alias, Condition: name + ".enabled",
		})
	}
	values := parse(t, `
global: {imageRegistry: registry.example.org}
magic-ip-address: {enabled: true, config: {ipAddress: 169.254.7.1, selector: app=apm-server}}
Stats_D: {enabled: true, fullnameOverride: statsd, nameOverride: statsd, config: {ipAddress: 169.254.7.2, selector: app=statsd}}
disabled: {enabled: false, config: {ipAddress: none}}
`)
	if err := chartutil.ProcessDependencies(parent, values); err != nil {
		t.Fatal(err)
	}
	all, err := chartutil.ToRenderValues(parent, values, chartutil.ReleaseOptions{Name: "r", Namespace: "n", IsInstall: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	rendered, err := engine.Render(parent, all)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string][]string{}
	for name, text := range rendered {
		switch {
		case strings.HasSuffix(name, "/daemonset.yaml"):
			var object struct {
				Metadata struct{ Name string }
				Spec     struct {
					Template struct {
						Spec struct{ Containers []struct{ Image string } }
					}
				}
			}
			unmarshal(t, text, &object)
			got[name] = []string{object.Metadata.Name, object.Spec.Template.Spec.Containers[0].Image}
		case strings.HasSuffix(name, "/configmap.yaml"):
			var object struct{ Data map[string]string }
			unmarshal(t, text, &object)
			got[name] = []string{strings.SplitN(object.Data["config.yaml"], "\n", 2)[0]}
		}
	}
	image := "registry.example.org/magic-ip-address/magic-ip-address:" + ours.Metadata.AppVersion
	want := map[string][]string{
		"parent/charts/magic-ip-address/templates/configmap.yaml": {`name: "n.r"`},
		"parent/charts/magic-ip-address/templates/daemonset.yaml": {"r-magic-ip-address", image},
		"parent/charts/Stats_D/templates/configmap.yaml":          {`name: "n.r.stats-d"`},
		"parent/charts/Stats_D/templates/daemonset.yaml":          {"statsd", image},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rendered (-want +got):\n%s\nof %q", diff, slices.Sorted(maps.Keys(rendered)))
	}
}

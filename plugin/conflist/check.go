package conflist

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
)

// speaks checks that the plugin understands every version that a runtime chooses for this list: one it does not
// know would fail each ADD. The list's own version is never changed, because that is the runtime's business too.
//
// A runtime that knows cniVersions takes the newest of them that it speaks itself; an older one takes cniVersion.
func speaks(d *Directory, f file, versions []string) (offered string, err error) {
	list, err := d.load(f)
	if err != nil {
		return "", err
	}
	var own struct {
		CNIVersion  string
		CNIVersions []string
	}
	if err := json.Unmarshal(f.data, &own); err != nil {
		return "", err
	}
	chosen := []string{list.CNIVersion}
	if own.CNIVersion != "" {
		chosen = append(chosen, own.CNIVersion)
	}
	for _, v := range chosen {
		switch {
		case slices.Contains(versions, v):
		case v == "":
			return "", fmt.Errorf("its cniVersion is missing, which means 0.1.0: %w; set one of %s in it", ErrVersion, strings.Join(versions, ", "))
		default:
			return "", fmt.Errorf("its cniVersion is %q: %w; set one of %s in it", v, ErrVersion, strings.Join(versions, ", "))
		}
	}
	for _, v := range own.CNIVersions {
		if newer, err := version.GreaterThan(v, slices.MaxFunc(versions, compareCNI)); err == nil && newer {
			offered = v
		}
	}
	return offered, nil
}

func compareCNI(a, b string) int {
	if newer, err := version.GreaterThan(a, b); err == nil && newer {
		return 1
	}
	return -1
}

// validate checks that the runtime loads the network of a file after the changes, with our entry in one place behind
// another plugin, and that nothing else of it differs.
func (p *Plan) validate(before file) error {
	then, err := p.original(before)
	if err != nil {
		return err
	}
	name := p.File
	if folder, _, ok := strings.Cut(name, "/"); ok && folder != "" {
		name = before.name
	}
	now, err := p.d.load(*p.d.find(name))
	if err != nil {
		return fmt.Errorf("%s would not load any more: %w", p.File, err)
	}
	others := func(list *libcni.NetworkConfigList) (plugins []string) {
		for _, plugin := range list.Plugins {
			if plugin.Network.Type != entry.Type {
				plugins = append(plugins, string(plugin.Bytes)) // in an order of its own, so that only meaning counts
			}
		}
		return plugins
	}
	if then.Name != now.Name || then.CNIVersion != now.CNIVersion || then.DisableCheck != now.DisableCheck || then.DisableGC != now.DisableGC ||
		then.LoadOnlyInlinedPlugins != now.LoadOnlyInlinedPlugins || !reflect.DeepEqual(others(then), others(now)) ||
		len(now.Plugins) != len(others(now))+1 || now.Plugins[0].Network.Type == entry.Type {
		return fmt.Errorf("with the entry, a loader would find more changed in %s than that: the file is left alone; look for keys in it that are there twice or differ in case only", before.name)
	}
	if name != before.name {
		for _, f := range p.d.files {
			if f.unusable != nil && name < f.name && f.name < before.name && p.d.options.Runtime != CRIO {
				return fmt.Errorf("%s cannot be used, and with %s containerd would pass it over: it is left alone until the other is corrected or removed", f.name, name)
			}
		}
		if first, _, _, err := p.d.first(time.Time{}, func(f file) bool { return f.unusable != nil }); err != nil || first == nil || first.name != name {
			if multus, _, _, _ := p.d.first(time.Time{}, isOwn); multus == nil || multus.name == before.name {
				return fmt.Errorf("%s would not be the file that the runtime takes: it is left alone", name)
			}
		}
	}
	return nil
}

// original is what a file held before the changes; that of a list of our own, with what others have added to it.
func (p *Plan) original(before file) (*libcni.NetworkConfigList, error) {
	if own := p.d.find(ownNameOf(before.name)); own != nil {
		bare, err := withoutEntries(own.data)
		if err != nil {
			return nil, err
		}
		list, err := p.d.load(file{name: own.name, data: bare})
		if err == nil && !synced(p.d, *own, before) {
			err = fmt.Errorf("%s would not be %s and our entry", own.name, before.name)
		}
		return list, err
	}
	return p.d.load(before)
}

package whole

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path"
	"runtime"
)

// The images that every node has. Echo is the program in integration/cluster/echo, which is the entrypoint.
const (
	ImageEcho  = "localhost/echo:e2e"
	imagePause = "localhost/pause:e2e"
)

// DaemonSet is the manifest of one whose pods run ImageEcho with these arguments (a list of YAML, without its brackets). Their labels are app and
// daemon-set, both the name.
func DaemonSet(name, namespace, args string) string {
	return fmt.Sprintf(`---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: %[1]s, namespace: %[2]s}
spec:
  selector: {matchLabels: {app: %[1]s, daemon-set: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s, daemon-set: %[1]s}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: %[1]s, image: "%[3]s", imagePullPolicy: Never, args: [%[4]s]}]
`, name, namespace, ImageEcho, args)
}

// Image is a container image of one layer.
type Image struct {
	Name       string
	Entrypoint []string
	Env        []string
	// Files are programs of the machine, by the path in the image.
	Files map[string]string
}

// Archive returns the image as `docker save` would.
func (i Image) Archive() ([]byte, error) {
	files := map[string][]byte{}
	for name, from := range i.Files {
		data, err := os.ReadFile(from)
		if err != nil {
			return nil, err
		}
		files[name] = data
	}
	layer, err := archive(files, 0o755)
	if err != nil {
		return nil, err
	}
	type object = map[string]any
	config, err := json.Marshal(object{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": object{"Entrypoint": i.Entrypoint, "Env": append([]string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, i.Env...)},
		"rootfs": object{"type": "layers", "diff_ids": []string{"sha256:" + digest(layer)}},
	})
	if err != nil {
		return nil, err
	}
	configName := digest(config) + ".json"
	manifest, err := json.Marshal([]object{{"Config": configName, "RepoTags": []string{i.Name}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		return nil, err
	}
	return archive(map[string][]byte{"manifest.json": manifest, configName: config, "layer.tar": layer}, 0o644)
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// archive is a tar of these files and their folders.
func archive(files map[string][]byte, mode int64) ([]byte, error) {
	var buffer bytes.Buffer
	writer := tar.NewWriter(&buffer)
	folders := map[string]bool{".": true, "/": true}
	var folder func(name string) error
	folder = func(name string) error {
		if folders[name] {
			return nil
		}
		folders[name] = true
		if err := folder(path.Dir(name)); err != nil {
			return err
		}
		return writer.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name[len("/"):] + "/", Mode: 0o755})
	}
	for name, data := range files {
		name = path.Join("/", name)
		if err := folder(path.Dir(name)); err != nil {
			return nil, err
		}
		if err := writer.WriteHeader(&tar.Header{Name: name[len("/"):], Mode: mode, Size: int64(len(data))}); err != nil {
			return nil, err
		}
		if _, err := writer.Write(data); err != nil {
			return nil, err
		}
	}
	if err := writer.Close(); err != nil {
		return nil, err
	}
	return buffer.Bytes(), nil
}

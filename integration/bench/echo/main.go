// Command echo is the least that a chained CNI plugin in Go can be: it decodes its configuration and prints
// prevResult, with the standard library alone. What another plugin costs beyond it is its own doing.
package main

import (
	"encoding/json"
	"fmt"
	"os"
)

func main() { os.Exit(run()) }

func run() int {
	if os.Getenv("CNI_COMMAND") != "ADD" {
		return 0
	}
	var conf struct {
		PrevResult json.RawMessage `json:"prevResult"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&conf); err != nil {
		fmt.Fprintln(os.Stderr, "echo:", err)
		return 1
	}
	if _, err := os.Stdout.Write(conf.PrevResult); err != nil {
		return 1
	}
	return 0
}

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// describe says what is measured and where, in one line: without it the figures mean nothing.
func describe(ctx context.Context) (string, error) {
	var uname unix.Utsname
	if err := unix.Uname(&uname); err != nil {
		return "", fmt.Errorf("uname: %w", err)
	}
	agent, err := binary("magic-ip-agent")
	if err != nil {
		return "", err
	}
	ours, err := exec.CommandContext(ctx, agent, "version").Output()
	if err != nil {
		return "", fmt.Errorf("%s version: %w", agent, err)
	}
	// nft is not in every user's PATH.
	nft, err := exec.CommandContext(ctx, "sh", "-c", "PATH=$PATH:/usr/sbin:/sbin nft --version").Output()
	if err != nil {
		return "", fmt.Errorf("nft --version: %w", err)
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s, %s: %s, %d cores, Linux %s, nft %s, load at the start %s",
		strings.TrimSpace(string(ours)), time.Now().UTC().Format(time.DateOnly), processor(), runtime.NumCPU(), unix.ByteSliceToString(uname.Release[:]), strings.Fields(string(nft))[1], strings.Fields(string(load))[0]), nil
}

func processor() string {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err == nil {
		for line := range strings.Lines(string(info)) {
			if key, value, _ := strings.Cut(line, ":"); strings.TrimSpace(key) == "model name" {
				return strings.TrimSpace(value)
			}
		}
	}
	return runtime.GOARCH // not every architecture names its model
}

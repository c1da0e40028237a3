// Package screentest has a terminal for tests of what is shown on one.
package screentest

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Terminal returns what f writes to a terminal of this size (a pseudoterminal; pty(7)). seen is called with all of it whenever there is more.
func Terminal(t *testing.T, columns, rows uint16, seen func(all string), f func(terminal *os.File)) string {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = master.Close() }()
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetUint32(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns}); err != nil {
		t.Fatal(err)
	}
	terminal, err := os.OpenFile("/dev/pts/"+strconv.FormatUint(uint64(number), 10), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	read := make(chan struct{})
	go func() {
		buffer := make([]byte, 64<<10)
		for {
			n, err := master.Read(buffer) // EIO once the terminal is closed
			out.Write(buffer[:n])
			if err != nil {
				break
			}
			seen(out.String())
		}
		close(read)
	}()
	f(terminal)
	_ = terminal.Close()
	<-read
	return out.String()
}

// Command program stands in, in the images that critest names, for the programs
// that these have upstream: it is what it is called.
//
//	nginx [PORT]    a web server whose master process has nginx' name
//	nonewprivs      says whom it runs as
//	pause           waits for a signal
//	sh              busybox', but for a script of one word
package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// page is asked for as what a fresh nginx serves.
const page = "<html><title>Welcome to nginx!</title></html>\n"

// master is how nginx calls its first process.
const master = "nginx: master process nginx"

func main() {
	if err := run(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch name := path.Base(args[0]); {
	case args[0] == master:
		return serve(args[1])
	case name == "nginx":
		port := "80"
		if len(args) > 1 {
			port = args[1]
		}
		return unix.Exec("/proc/self/exe", []string{master, port}, os.Environ())
	case name == "nonewprivs":
		fmt.Println("Effective uid:", os.Geteuid())
	case name == "pause":
		told := make(chan os.Signal, 1)
		signal.Notify(told, unix.SIGTERM, unix.SIGINT)
		<-told
	case name == "sh":
		return shell(args)
	default:
		return fmt.Errorf("no program %q", name)
	}
	return nil
}

var word = regexp.MustCompile(`^[a-z]+$`)

// shell looks for a command in PATH as upstream's does: Debian's busybox takes
// its own ls for the one whose path is masked.
func shell(args []string) error {
	if len(args) == 3 && args[1] == "-c" && word.MatchString(args[2]) {
		for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
			if err := unix.Exec(filepath.Join(dir, args[2]), args[2:], os.Environ()); errors.Is(err, unix.EACCES) {
				return fmt.Errorf("%s: %s: Permission denied", args[0], args[2])
			}
		}
	}
	return unix.Exec("/bin/busybox", args, os.Environ())
}

func serve(port string) error {
	if err := os.WriteFile("/var/run/nginx.pid", fmt.Appendln(nil, os.Getpid()), 0o644); err != nil {
		return err
	}
	l, err := net.Listen("tcp", ":"+port) //nolint:noctx // for as long as the process lives
	if err != nil {
		return err
	}
	fmt.Println("httpd listens on", port)
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go answer(conn)
	}
}

// answer takes whatever is said for a request of the page.
func answer(conn net.Conn) {
	defer conn.Close()
	request := make([]byte, 4<<10)
	for n := 0; !strings.Contains(string(request[:n]), "\r\n\r\n"); {
		m, err := conn.Read(request[n:])
		if err != nil || n+m == len(request) {
			return
		}
		n += m
	}
	_, _ = fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(page), page)
}

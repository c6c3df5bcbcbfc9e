package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// loggerGrace bounds how long a logger may take to end after its input has, and
// again after SIGTERM.
const loggerGrace = 5 * time.Second

// A logger is a program that takes the outputs (containerd's binary: scheme):
// they are its descriptors 3 and 4; 5 is closed when it is ready, for
// binary-v2 after one byte.
type logger struct {
	cmd            *exec.Cmd
	stdout, stderr *fileSink
	done           chan struct{}
}

func startLogger(ctx context.Context, uri *url.URL, id, namespace string) (_ *logger, err error) {
	args, err := loggerArgs(uri.RawQuery)
	if err != nil {
		return nil, err
	}
	var files []*os.File
	defer func() {
		for i, f := range files {
			if ours := i%2 == 1; !ours || err != nil {
				_ = f.Close()
			}
		}
	}()
	for range 3 {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		files = append(files, r, w)
	}
	files[4], files[5] = files[5], files[4] // of the third we read
	ready := files[5]
	defer ready.Close()

	// It ends by itself behind the last byte, whatever becomes of this request.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), uri.Path, args...)
	cmd.Env = []string{"CONTAINER_ID=" + id, "CONTAINER_NAMESPACE=" + namespace}
	cmd.ExtraFiles = []*os.File{files[0], files[2], files[4]}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	l := &logger{
		cmd:    cmd,
		stdout: &fileSink{File: files[1]},
		stderr: &fileSink{File: files[3]},
		done:   make(chan struct{}),
	}
	go func() { // joined by close
		defer close(l.done)
		_ = cmd.Wait()
	}()
	_ = files[4].Close()
	if err := waitReady(ctx, ready, uri.Scheme == "binary-v2"); err != nil {
		_ = cmd.Process.Kill()
		<-l.done
		return nil, err
	}
	return l, nil
}

// loggerArgs are the keys and values of the query, in order.
func loggerArgs(query string) ([]string, error) {
	var args []string
	for pair := range strings.SplitSeq(query, "&") {
		if pair == "" {
			continue
		}
		key, value, _ := strings.Cut(pair, "=")
		for _, s := range []string{key, value} {
			arg, err := url.QueryUnescape(s)
			if err != nil {
				return nil, fmt.Errorf("argument %q: %w", s, err)
			}
			args = append(args, arg)
		}
	}
	return args, nil
}

func waitReady(ctx context.Context, r *os.File, byteNeeded bool) error {
	stop := context.AfterFunc(ctx, func() { _ = r.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	n, err := r.Read(make([]byte, 1))
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("wait until it is ready: %w", ctx.Err())
	case err != nil && !errors.Is(err, io.EOF):
		return err
	case n == 0 && byteNeeded:
		return errors.New("it ended before it was ready")
	}
	return nil
}

// close waits until the logger has taken everything and ended.
func (l *logger) close(ctx context.Context) {
	_ = l.stdout.Close()
	_ = l.stderr.Close()
	for _, signal := range []os.Signal{unix.SIGTERM, unix.SIGKILL} {
		timeout := time.NewTimer(loggerGrace)
		select {
		case <-l.done:
			timeout.Stop()
			return
		case <-timeout.C:
			log.G(ctx).WithField("signal", signal.String()).Warn("logger does not end at the end of its input")
			_ = l.cmd.Process.Signal(signal)
		}
	}
	<-l.done
}

package guest

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A watcher calls functions when files of control groups change. One inotify
// instance and one goroutine, run, serve all of them.
type watcher struct {
	file *os.File // the inotify instance, non-blocking

	mu    sync.Mutex
	funcs map[int32][]*func() // by watch descriptor; guarded by mu
}

func newWatcher() (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make inotify instance: %w", err)
	}
	return &watcher{file: os.NewFile(uintptr(fd), "inotify"), funcs: map[int32][]*func(){}}, nil
}

// add has f called after each change of the file, by run: f must not wait.
func (w *watcher) add(path string, f func()) (remove func(), err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	wd, err := w.addWatch(path)
	if err != nil {
		return nil, err
	}
	w.funcs[wd] = append(w.funcs[wd], &f)
	return func() { w.remove(wd, &f) }, nil
}

func (w *watcher) addWatch(path string) (wd int32, err error) {
	err = w.control(func(fd int) error {
		n, err := unix.InotifyAddWatch(fd, path, unix.IN_MODIFY)
		wd = int32(n)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("watch %s: %w", path, err)
	}
	return wd, nil
}

func (w *watcher) remove(wd int32, f *func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	fs := w.funcs[wd]
	for i := range fs {
		if fs[i] == f {
			fs = append(fs[:i:i], fs[i+1:]...)
			break
		}
	}
	if len(fs) > 0 {
		w.funcs[wd] = fs
		return
	}
	delete(w.funcs, wd)
	// The kernel has removed it already when the file is gone.
	_ = w.control(func(fd int) error {
		_, err := unix.InotifyRmWatch(fd, uint32(wd))
		return err
	})
}

func (w *watcher) control(f func(fd int) error) error {
	conn, err := w.file.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := conn.Control(func(fd uintptr) { ferr = f(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

// run returns after close.
func (w *watcher) run() error {
	buf := make([]byte, 64*(unix.SizeofInotifyEvent+unix.NAME_MAX+1))
	for {
		n, err := w.file.Read(buf)
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read inotify events: %w", err)
		}
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			event := (*unix.InotifyEvent)(unsafe.Pointer(&b[0]))
			w.call(event.Wd)
			b = b[min(len(b), unix.SizeofInotifyEvent+int(event.Len)):]
		}
	}
}

func (w *watcher) call(wd int32) {
	w.mu.Lock()
	fs := w.funcs[wd]
	w.mu.Unlock()
	for _, f := range fs {
		(*f)()
	}
}

func (w *watcher) close() error { return w.file.Close() }

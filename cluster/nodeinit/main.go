// Command nodeinit is PID 1 of a node. A node is a set of namespaces (pid, mount, network, uts, ipc), as a container of kind is:
// when its PID 1 dies, for whatever reason, the kernel ends every process, mount, network device and firewall rule inside at once,
// so that nothing has to be tidied one by one, and several clusters cannot collide.
//
//	nodeinit launch SPEC   start a node from the host; prints the host's pid of its PID 1
//	nodeinit run SPEC      be that PID 1
package main

import (
	"encoding/json"
	"fmt"
	"log"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

// Spec says what a node is made of. The driver writes it.
type Spec struct {
	Hostname  string     `json:"hostname"`
	Cgroup    string     `json:"cgroup"`  // folder below every cgroup hierarchy
	Binds     []Bind     `json:"binds"`   // in order
	Tmpfs     []string   `json:"tmpfs"`   // mounted before the binds
	Device    string     `json:"device"`  // the driver moves this network device into the node
	Network   [][]string `json:"network"` // commands, run once Device is there
	Sysctls   []Sysctl   `json:"sysctls"`
	LogFolder string     `json:"logFolder"`
	Programs  []Program  `json:"programs"`
}

// Bind makes Source seen as Target.
type Bind struct {
	Source string `json:"source"`
	Target string `json:"target"`
}

// Sysctl is a file below /proc/sys and what to write there.
type Sysctl struct {
	Path  string `json:"path"`
	Value string `json:"value"`
}

// Program is kept running. It is first started when every address in WaitFor (network and address, "tcp 127.0.0.1:2379") accepts a connection;
// with the network "file" that path has to exist.
type Program struct {
	Name    string     `json:"name"`
	Argv    []string   `json:"argv"`
	Env     []string   `json:"env"`
	WaitFor [][]string `json:"waitFor"`
}

func main() {
	log.SetFlags(log.LstdFlags | log.LUTC)
	if len(os.Args) != 3 {
		log.Fatal("usage: nodeinit launch|run SPEC")
	}
	spec := readSpec(os.Args[2])
	switch os.Args[1] {
	case "launch":
		launch(spec, os.Args[2])
	case "run":
		run(spec)
	default:
		log.Fatalf("unknown command %q", os.Args[1])
	}
}

func readSpec(path string) Spec {
	content, err := os.ReadFile(path)
	must(err)
	var spec Spec
	must(json.Unmarshal(content, &spec))
	return spec
}

func launch(spec Spec, path string) {
	self, err := os.Executable()
	must(err)
	must(os.MkdirAll(spec.LogFolder, 0o755))
	output := openLog(spec, "nodeinit")
	null, err := os.Open(os.DevNull)
	must(err)
	process, err := os.StartProcess(self, []string{"nodeinit", "run", path}, &os.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"},
		Files: []*os.File{null, output, output},
		Sys: &syscall.SysProcAttr{
			Setsid:     true,
			Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
		},
	})
	must(err)
	fmt.Println(process.Pid)
}

func run(spec Spec) {
	if os.Getpid() != 1 {
		log.Fatal("not PID 1: use launch")
	}
	must(syscall.Sethostname([]byte(spec.Hostname)))
	enterCgroup(spec.Cgroup)
	mount(spec)
	waitForDevice(spec.Device, 30*time.Second)
	for _, sysctl := range spec.Sysctls {
		must(os.WriteFile(filepath.Join("/proc/sys", sysctl.Path), []byte(sysctl.Value), 0o644))
	}
	for _, command := range spec.Network {
		output, err := exec.Command(command[0], command[1:]...).CombinedOutput()
		if err != nil {
			log.Fatalf("%v: %v: %s", command, err, output)
		}
	}
	supervise(spec)
}

// enterCgroup leaves the cgroups of whoever called the driver, which may be ended as a whole with that caller's session.
func enterCgroup(name string) {
	hierarchies, err := filepath.Glob("/sys/fs/cgroup/*")
	must(err)
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil { // cgroup v2 has one hierarchy
		hierarchies = []string{"/sys/fs/cgroup"}
	}
	for _, hierarchy := range hierarchies {
		if info, err := os.Lstat(hierarchy); err != nil || !info.IsDir() {
			continue // links, as cpu,cpuacct often is
		}
		folder := filepath.Join(hierarchy, name, "node")
		if err := os.MkdirAll(folder, 0o755); err != nil {
			log.Printf("cgroup: %v", err)
			continue
		}
		inheritCpuset(hierarchy, folder)
		if err := os.WriteFile(filepath.Join(folder, "cgroup.procs"), []byte("0"), 0o644); err != nil {
			log.Printf("cgroup %s: %v", folder, err)
		}
	}
}

// inheritCpuset fills what a new cpuset of cgroup v1 lacks, from the top: no process can enter an empty one.
func inheritCpuset(hierarchy, folder string) {
	if folder == hierarchy {
		return
	}
	parent := filepath.Dir(folder)
	inheritCpuset(hierarchy, parent)
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		if content, err := os.ReadFile(filepath.Join(folder, file)); err == nil && len(content) <= 1 {
			if value, err := os.ReadFile(filepath.Join(parent, file)); err == nil {
				_ = os.WriteFile(filepath.Join(folder, file), value, 0o644)
			}
		}
	}
}

func mount(spec Spec) {
	// First private, so that nothing reaches the host; then shared, as kubelet and containerd pass mounts on to pods.
	must(syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""))
	must(syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_SHARED, ""))
	must(syscall.Mount("proc", "/proc", "proc", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, ""))
	for _, bind := range spec.Binds {
		if err := syscall.Mount(bind.Source, bind.Target, "", syscall.MS_BIND, ""); err != nil {
			log.Fatalf("bind %s to %s: %v", bind.Source, bind.Target, err)
		}
	}
	for _, target := range spec.Tmpfs {
		if err := syscall.Mount("tmpfs", target, "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, "mode=755"); err != nil {
			log.Fatalf("tmpfs %s: %v", target, err)
		}
	}
}

// waitForDevice gives up after a while: a driver that was killed before it moved the device leaves nothing behind.
func waitForDevice(name string, limit time.Duration) {
	for end := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		if _, err := net.InterfaceByName(name); err == nil {
			return
		}
		if time.Now().After(end) {
			log.Fatalf("network device %s did not come within %s", name, limit)
		}
	}
}

type exit struct {
	pid    int
	status syscall.WaitStatus
}

// supervise starts every program, starts it again when it ends, and reaps what others left to PID 1. One goroutine alone waits for
// children: os/exec would race with it.
func supervise(spec Spec) {
	running := map[int]Program{}
	start := make(chan Program)
	exits := make(chan exit)
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)

	go func() {
		for range children {
			for {
				var status syscall.WaitStatus
				pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
				if err == syscall.EINTR {
					continue
				}
				if err != nil || pid <= 0 {
					break
				}
				exits <- exit{pid, status}
			}
		}
	}()
	for _, program := range spec.Programs {
		go func() {
			for _, address := range program.WaitFor {
				waitForAddress(address[0], address[1])
			}
			start <- program
		}()
	}
	for {
		select {
		case program := <-start:
			if pid, err := startProgram(spec, program); err != nil {
				log.Printf("%s: %v", program.Name, err)
				startLater(start, program)
			} else {
				log.Printf("%s: started as %d", program.Name, pid)
				running[pid] = program
			}
		case e := <-exits:
			if program, ours := running[e.pid]; ours {
				delete(running, e.pid)
				log.Printf("%s: ended, exit code %d, signal %d", program.Name, e.status.ExitStatus(), e.status.Signal())
				startLater(start, program)
			}
		case s := <-stop:
			log.Printf("stopping on %s", s)
			os.Exit(0) // the kernel ends the rest
		}
	}
}

func startLater(start chan<- Program, program Program) {
	time.AfterFunc(time.Second, func() { start <- program })
}

func startProgram(spec Spec, program Program) (int, error) {
	output := openLog(spec, program.Name)
	defer output.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	process, err := os.StartProcess(program.Argv[0], program.Argv, &os.ProcAttr{
		Dir:   "/",
		Env:   append(os.Environ(), program.Env...),
		Files: []*os.File{null, output, output},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, err
	}
	pid := process.Pid
	return pid, process.Release()
}

func waitForAddress(network, address string) {
	for {
		if network == "file" {
			if _, err := os.Stat(address); err == nil {
				return
			}
			time.Sleep(50 * time.Millisecond)
			continue
		}
		connection, err := net.DialTimeout(network, address, time.Second)
		if err == nil {
			connection.Close()
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func openLog(spec Spec, name string) *os.File {
	file, err := os.OpenFile(filepath.Join(spec.LogFolder, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	must(err)
	return file
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

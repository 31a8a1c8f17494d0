// Command podtool is what runs in the cluster's own pods: `pause` (the sandbox container of every pod) and a few
// behaviours for tests. It is static and uses the standard library only, so that a one-layer image of one file holds it and
// neither a distribution image nor a registry is needed.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

const usage = `usage: podtool COMMAND
  pause                 reap children until told to stop
  sleep SECONDS         0 on TERM as well
  exit CODE [MESSAGE]   MESSAGE becomes the termination message
  print TEXT
  serve ADDRESS TEXT    HTTP server, for example serve :8080 hello
  get URL SECONDS       print the body; tries again until SECONDS have passed
  resolve NAME SECONDS  print the addresses; tries again until SECONDS have passed
  reach ADDRESS SECONDS exit 0 if a TCP connection to host:port is made within SECONDS, 3 if not
  eat-memory MIB        allocate and touch MIB mebibytes, then wait
  write FILE TEXT
  read FILE
`

func main() {
	args := os.Args[1:]
	if filepath.Base(os.Args[0]) == "pause" {
		args = []string{"pause"}
	}
	if len(args) == 0 {
		fail(2, usage)
	}
	switch command, rest := args[0], args[1:]; command {
	case "pause":
		pause()
	case "sleep":
		wait(seconds(arg(rest, 0)))
	case "exit":
		if len(rest) > 1 {
			must(os.WriteFile("/dev/termination-log", []byte(rest[1]), 0o644))
		}
		os.Exit(number(arg(rest, 0)))
	case "print":
		fmt.Println(arg(rest, 0))
	case "serve":
		text := arg(rest, 1)
		must(http.ListenAndServe(arg(rest, 0), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, text) })))
	case "get":
		fmt.Println(retry(seconds(arg(rest, 1)), func() (string, error) { return get(arg(rest, 0)) }))
	case "resolve":
		fmt.Println(retry(seconds(arg(rest, 1)), func() (string, error) {
			addresses, err := net.LookupHost(arg(rest, 0))
			return fmt.Sprint(addresses), err
		}))
	case "reach":
		connection, err := net.DialTimeout("tcp", arg(rest, 0), seconds(arg(rest, 1)))
		if err != nil {
			fail(3, err.Error())
		}
		connection.Close()
	case "eat-memory":
		block := make([]byte, number(arg(rest, 0))<<20)
		for i := 0; i < len(block); i += 4096 {
			block[i] = 1
		}
		wait(time.Hour)
		fmt.Println(block[0])
	case "write":
		must(os.WriteFile(arg(rest, 0), []byte(arg(rest, 1)), 0o644))
	case "read":
		content, err := os.ReadFile(arg(rest, 0))
		must(err)
		fmt.Print(string(content))
	default:
		fail(2, usage)
	}
}

// pause holds a pod's namespaces. It reaps, as it is PID 1 where containers share the process namespace.
func pause() {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGCHLD)
	for s := range signals {
		if s != syscall.SIGCHLD {
			return
		}
		for pid := 1; pid > 0; {
			pid, _ = syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
		}
	}
}

func wait(d time.Duration) {
	stop, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	select {
	case <-time.After(d):
	case <-stop.Done():
	}
}

func get(url string) (string, error) {
	client := http.Client{Timeout: 3 * time.Second}
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return string(body), err
}

func retry(limit time.Duration, try func() (string, error)) string {
	for end := time.Now().Add(limit); ; time.Sleep(100 * time.Millisecond) {
		result, err := try()
		if err == nil {
			return result
		}
		if time.Now().After(end) {
			fail(1, err.Error())
		}
	}
}

func arg(args []string, i int) string {
	if i >= len(args) {
		fail(2, usage)
	}
	return args[i]
}

func number(s string) int {
	n, err := strconv.Atoi(s)
	must(err)
	return n
}

func seconds(s string) time.Duration { return time.Duration(number(s)) * time.Second }

func must(err error) {
	if err != nil {
		fail(1, err.Error())
	}
}

func fail(code int, message string) {
	fmt.Fprintln(os.Stderr, message)
	os.Exit(code)
}

package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	devices "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
	"k8s.io/kubernetes/pkg/kubelet/cm/devicemanager/plugin/v1beta1"
)

// runPretendGPUs is a device plugin for GPUs that are not there. A device plugin, and not a patch of the node's status, because
// the kubelet sets patched extended resources back to 0 when it starts, and because the kubelet itself then refuses a pod that would
// take more than there are, as it does in production.
func runPretendGPUs() int {
	flags := flag.NewFlagSet("pretend-gpus", flag.ExitOnError)
	resource := flags.String("resource", "nvidia.com/gpu", "name of the extended resource")
	countFile := flags.String("count-file", "", "file with the number of devices to advertise; a change is noticed")
	_ = flags.Parse(os.Args[1:])

	count, err := readCount(*countFile)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	list := make([]*devices.Device, count)
	for i := range list {
		list[i] = &devices.Device{ID: fmt.Sprintf("GPU-pretend-%d", i), Health: devices.Healthy}
	}
	socket := filepath.Join(devices.DevicePluginPath, "pretend-gpus.sock")
	plugin := v1beta1.NewDevicePluginStub(list, socket, *resource, false, false)
	plugin.SetAllocFunc(allocate)
	// The kubelet empties the folder of sockets when it starts, so its own comes first.
	for _, err := os.Stat(devices.KubeletSocket); err != nil; _, err = os.Stat(devices.KubeletSocket) {
		time.Sleep(200 * time.Millisecond)
	}
	watched, err := os.Stat(devices.KubeletSocket)
	if err == nil {
		err = plugin.Start()
	}
	if err == nil {
		err = plugin.Register(devices.KubeletSocket, *resource, "")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	// A restarted kubelet makes a new socket and forgets its plugins; that and another count end this program, and the supervisor
	// starts it anew.
	for ; err == nil; time.Sleep(time.Second) {
		var now os.FileInfo
		if now, err = os.Stat(devices.KubeletSocket); err == nil && !sameSocket(watched, now) {
			break
		}
		// The kubelet removes the sockets of its plugins when it starts.
		if _, err = os.Stat(socket); err != nil {
			break
		}
		if wanted, err := readCount(*countFile); err == nil && wanted != count {
			break
		}
	}
	return 0
}

// sameSocket compares the time too: a new socket may well get the inode of the one that was just removed.
func sameSocket(a, b os.FileInfo) bool {
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime())
}

func readCount(file string) (int, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(content)))
}

// allocate names the devices in the variable that NVIDIA's runtime uses, so that a test can see which a pod was given.
func allocate(request *devices.AllocateRequest, _ map[string]*devices.Device) (*devices.AllocateResponse, error) {
	response := &devices.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		response.ContainerResponses = append(response.ContainerResponses, &devices.ContainerAllocateResponse{
			Envs: map[string]string{"NVIDIA_VISIBLE_DEVICES": strings.Join(container.DevicesIds, ",")},
		})
	}
	return response, nil
}

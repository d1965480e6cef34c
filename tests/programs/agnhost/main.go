// Command agnhost has those commands of upstream's test image that tests of host ports use: the whole of it takes
// minutes to build.
package main

import (
	"os"

	"github.com/spf13/cobra"
	"k8s.io/kubernetes/test/images/agnhost/netexec"
	"k8s.io/kubernetes/test/images/agnhost/pause"
)

func main() {
	root := &cobra.Command{Use: "agnhost"}
	root.AddCommand(netexec.CmdNetexec, pause.CmdPause)
	if root.Execute() != nil {
		os.Exit(1)
	}
}
